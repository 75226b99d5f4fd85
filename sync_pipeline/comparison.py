"""One side of a comparison: a table's rows as hashes, by bucket, by record, or for a few records.

Every row falls into one of 4096 buckets by the hash of its record's id, so that there is no first and no last range.
A bucket is its number of rows and two sums of 64-bit hashes of them: unlike XOR, a sum notices a row that is there
twice, and what a bucket holds does not depend on the order in which it is read. The hash covers all fields, the key's
among them, in one order, each in the text that COPY would send; a record's text quotes its fields, so that NULL is
not '' and no two rows share a text.
"""

import json
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

from psycopg import sql

from sync_pipeline import queries
from sync_pipeline.capture import record_id
from sync_pipeline.column_types import common_form
from sync_pipeline.database import Connection
from sync_pipeline.records import Relation

BUCKETS = 4096
_BUCKET_SEED, _FIRST_SEED, _SECOND_SEED = 0, 1, 2

State = Literal["", "pending", "outside"]


@dataclass(frozen=True, slots=True)
class Bucket:
    """The rows of a bucket: how many there are, how many of them are compared, and the sums of their hashes."""

    rows: int = 0
    compared: int = 0
    first_sum: str | None = None
    second_sum: str | None = None

    def equals(self, other: "Bucket") -> bool:
        """True when the rows that are compared are those of the other side's bucket."""
        mine = (self.compared, self.first_sum, self.second_sum)
        return mine == (other.compared, other.first_sum, other.second_sum)


class Record(NamedTuple):
    """A record on one side: the hash of its row, None without one; and why it is not compared, if so."""

    record_id: str
    digest: str | None
    state: State


@dataclass(frozen=True)
class Side:
    """A table on one node, seen against the same table on the other.

    With `portable` hashes are of UTF-8 bytes and by MD5: slower, and the same whatever the encoding and the machine.
    """

    connection: Connection
    relation: Relation
    other: Relation
    schema: str
    encoding: str
    portable: bool

    def scan(self) -> dict[int, Bucket]:
        """Read the whole table once; return its buckets that are not empty."""
        is_compared = sql.SQL("filter (where inside)" if self.relation.where else "")
        statement = sql.SQL(
            """
select bucket, count(*), count(*) {compared}, (sum(first) {compared})::text, (sum(second) {compared})::text
from (
    select {bucket} as bucket, inside, {first} as first, {second} as second
    from ({texts}) as texts
) as hashed
group by bucket"""
        ).format(
            compared=is_compared,
            bucket=self._bucket(sql.SQL("record_id")),
            first=self._hash(sql.SQL("row_text"), _FIRST_SEED),
            second=self._hash(sql.SQL("row_text"), _SECOND_SEED),
            texts=self._texts(sql.SQL("true")),
        )
        return {row[0]: Bucket(*row[1:]) for row in self.connection.execute(statement)}

    def records(self, buckets: Sequence[int]) -> Generator[Record, None, None]:
        """Stream the records of some buckets in the order of Python's strings, those that only wait here too."""
        in_buckets = sql.SQL("{} = any ({}::integer[])")
        statement = sql.SQL(
            """
copy (
    select
        coalesce(present.record_id, waiting.record_id) as record_id,
        present.digest,
        case when waiting.record_id is not null then 'pending' when not inside then 'outside' else '' end
    from (
        select record_id collate "C" as record_id, {digest} as digest, inside from ({texts}) as texts
    ) as present
    full join (
        select record_id collate "C" as record_id from ({waiting}) as waiting where {waiting_in_buckets}
    ) as waiting on waiting.record_id = present.record_id
    order by {order}
) to stdout"""
        ).format(
            digest=self._digest(sql.SQL("row_text")),
            texts=self._texts(in_buckets.format(self._bucket(self._record_id), list(buckets))),
            waiting=self._waiting,
            waiting_in_buckets=in_buckets.format(
                self._bucket(sql.SQL("waiting.record_id")), list(buckets)
            ),
            # The order of code points, which is that of UTF-8's bytes.
            order=sql.SQL("1")
            if self.encoding == "UTF8"
            else sql.SQL(
                "pg_catalog.convert_to(coalesce(present.record_id, waiting.record_id), 'UTF8')"
            ),
        )
        with self.connection.cursor().copy(statement) as copy:
            for row in copy.rows():
                yield Record(*cast("tuple[str, str | None, State]", row))

    def look(self, record_ids: Sequence[str]) -> dict[str, Record]:
        """Return some records as they are now, by their ids."""
        statement = sql.SQL(
            """
select
    asked.record_id,
    present.digest,
    case when asked.record_id in ({waiting}) then 'pending' when not present.inside then 'outside' else '' end
from pg_catalog.jsonb_array_elements_text({record_ids}::jsonb) as asked (record_id)
left join lateral (
    select {digest} as digest, {inside} as inside
    from {relation} as t
    where {same_key}
) as present on true"""
        ).format(
            waiting=self._waiting,
            # One text: a list of thousands would be quoted item by item.
            record_ids=json.dumps(list(record_ids), ensure_ascii=False),
            digest=self._digest(self._row_text),
            inside=self._inside,
            relation=self._relation,
            same_key=self._same_key(sql.SQL("asked.record_id")),
        )
        return {row[0]: Record(*row) for row in self.connection.execute(statement)}

    def _texts(self, condition: sql.Composable) -> sql.Composed:
        """The rows that meet a condition as texts, each composed once: `offset 0` keeps it from being inlined."""
        return sql.SQL(
            "select {record_id} as record_id, {row_text} as row_text, {inside} as inside "
            "from {relation} as t where {condition} offset 0"
        ).format(
            record_id=self._record_id,
            row_text=self._row_text,
            inside=self._inside,
            relation=self._relation,
            condition=condition,
        )

    @property
    def _relation(self) -> sql.Identifier:
        return sql.Identifier(self.relation.schema, self.relation.name)

    def _column(self, field: str) -> sql.Composed:
        return sql.SQL("t.{}").format(sql.Identifier(self.relation.columns[field].name))

    @property
    def _record_id(self) -> sql.Composed:
        return record_id(self.relation, {field: self._column(field) for field in self.relation.key})

    @property
    def _row_text(self) -> sql.Composed:
        """All fields as one text. Both sides list them in the first node's order."""
        values = [
            sql.SQL(common_form(column, self.other.columns[field])).format(self._column(field))
            for field, column in self.relation.columns.items()
        ]
        return sql.SQL("row({})::text").format(sql.SQL(", ").join(values))

    @property
    def _inside(self) -> sql.Composed:
        return sql.SQL("({}) is true").format(sql.SQL(self.relation.where or "true"))

    @property
    def _waiting(self) -> sql.Composed:
        text = queries.get("waiting_records", self.schema)
        return sql.SQL(text.decode()).format(table=self.relation.table)

    def _same_key(self, text: sql.SQL) -> sql.Composed:
        columns = [self.relation.columns[field] for field in self.relation.key]
        if len(columns) == 1:
            values = [sql.SQL("{}::" + columns[0].type_name).format(text)]
        else:
            values = [
                sql.SQL("({}::jsonb ->> " + str(index) + ")::" + column.type_name).format(text)
                for index, column in enumerate(columns)
            ]
        return sql.SQL(" and ").join(
            sql.SQL("{} = {}").format(self._column(field), value)
            for field, value in zip(self.relation.key, values, strict=True)
        )

    def _bucket(self, text: sql.Composable) -> sql.Composed:
        return sql.SQL("({} & {})::integer").format(self._hash(text, _BUCKET_SEED), BUCKETS - 1)

    def _digest(self, text: sql.Composable) -> sql.Composed:
        return sql.SQL("pg_catalog.concat_ws(' ', {}, {})").format(
            self._hash(text, _FIRST_SEED), self._hash(text, _SECOND_SEED)
        )

    def _hash(self, text: sql.Composable, seed: int) -> sql.Composed:
        if not self.portable:
            return sql.SQL('pg_catalog.hashtextextended(({}) collate "C", {})').format(text, seed)
        half = sql.SQL("right" if seed == _SECOND_SEED else "left")
        return sql.SQL(
            "('x' || pg_catalog.{}(pg_catalog.md5(pg_catalog.convert_to({}, 'UTF8')), 16))::bit(64)::bigint"
        ).format(half, text)
