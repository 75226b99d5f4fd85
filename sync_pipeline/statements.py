"""The set-based SQL that applies staged rows to one table, composed once per table from its catalog entry.

A staging table is temporary, so that nothing of it is logged, and has `n` (the row's number in its batch),
`present` (false: the record is gone on the source) and one column per field, `c0`, `c1` …, key first.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, LiteralString

from psycopg import sql

from sync_pipeline.capture import record_id
from sync_pipeline.records import SAME_IN_JSONB, ForeignKey, Relation

# What the events say of the staged records: whether the target has them.
Expected = Literal["new", "mostly new", "known"]
# Whose row of a logged conflict: that of the node that has the log, or the other's.
Whose = Literal["local", "remote"]

# The staged records of some numbers, which are few. The planner, without statistics of a staging table, believes that
# of a range alone; else it might read all of the table of the user.
AMONG = sql.SQL("s.n = any (%(numbers)s::bigint[]) and s.n between 0 and 9223372036854775807")


@dataclass(frozen=True)
class TableStatements:
    """How one table of the target is written.

    `raw`: the staging table holds texts whose bytes in this encoding, in which every byte is a character, are the
    UTF-8 of the values. They are read where they are used, so that one that cannot be read fails alone.

    The numbers of the records that a statement takes are its parameters `first` and `last`.
    """

    relation: Relation
    stage_name: str
    raw: LiteralString | None = None
    first: LiteralString = "%(first)s"
    last: LiteralString = "%(last)s"

    @property
    def single(self) -> "TableStatements":
        """The same for a staging table of few records, each written by a statement that PostgreSQL itself executes."""
        return replace(self, stage_name=f"{self.stage_name}_single", first="$1", last="$2")

    @property
    def _numbered(self) -> sql.Composed:
        return sql.SQL("s.n between {} and {}").format(sql.SQL(self.first), sql.SQL(self.last))

    @property
    def _chosen(self) -> sql.Composed:
        """The records of a statement that are there on the source."""
        return sql.SQL("s.present and {}").format(self._numbered)

    @property
    def stage(self) -> sql.Identifier:
        """The staging table."""
        return sql.Identifier("pg_temp", self.stage_name)

    @property
    def target(self) -> sql.Identifier:
        """The user's table."""
        return sql.Identifier(self.relation.schema, self.relation.name)

    def column(self, field: str) -> sql.Identifier:
        """The user's column of a field."""
        return sql.Identifier(self.relation.columns[field].name)

    def staged(self, field: str, alias: str = "s") -> sql.Composed:
        """A field's staged value, in the base type of the user's column.

        A cast to a domain would cut a value that is too long; the assignment to the column refuses it.
        """
        value = sql.SQL(f"{alias}.c{self.relation.fields.index(field)}")
        if self.raw is None:
            return sql.Composed([value])
        return sql.SQL("{}::" + self.relation.columns[field].type_name).format(self._read(value))

    def _bytes(self, value: sql.Composable) -> sql.Composed:
        return sql.SQL("pg_catalog.convert_to({}, {})").format(value, self.raw)

    def _read(self, value: sql.Composable) -> sql.Composed:
        return sql.SQL("pg_catalog.convert_from({}, 'UTF8')").format(self._bytes(value))

    @property
    def record_id(self) -> sql.Composed:
        """The text of a staged record's key, as `sync_events` has it."""
        return record_id(
            self.relation,
            {
                field: self._read(value) if self._is_kept_raw(field) else self.staged(field)
                for field, value in self._keys.items()
            },
        )

    @property
    def _bytes_of_id(self) -> sql.Composed:
        """The UTF-8 of a staged record's id, even where the target has not all of its characters."""
        keys = {
            field: sql.Composed([value]) if self._is_kept_raw(field) else self.staged(field)
            for field, value in self._keys.items()
        }
        text = record_id(self.relation, keys)
        return text if self.raw is None else self._bytes(text)

    def _is_kept_raw(self, field: str) -> bool:
        """Whether the id takes the text of a key as it was staged: a cast could fail again."""
        numbers = {"numeric", "real", "double precision"}
        return self.raw is not None and self.relation.columns[field].type_name not in numbers

    @property
    def _keys(self) -> dict[str, sql.SQL]:
        return {field: sql.SQL(f"s.c{index}") for index, field in enumerate(self.relation.key)}

    def same_key(self, alias: str = "s") -> sql.Composed:
        """The join of the user's row `t` with its staged row."""
        return sql.SQL(" and ").join(
            sql.SQL("t.{} = {}").format(self.column(field), self.staged(field, alias))
            for field in self.relation.key
        )

    @property
    def child_id(self) -> sql.Composed:
        """The id of the user's row `c`."""
        fields = self.relation.key
        return record_id(
            self.relation, {field: sql.SQL("c.{}").format(self.column(field)) for field in fields}
        )

    @property
    def same_child(self) -> sql.Composed:
        """The join of the user's row `c` with its staged row `g`."""
        return sql.SQL(" and ").join(
            sql.SQL("c.{} = {}").format(self.column(field), self.staged(field, "g"))
            for field in self.relation.key
        )

    @property
    def not_staged(self) -> sql.Composed:
        """And true when the user's row `c` is not staged."""
        return sql.SQL(" and not exists (select from {} as g where {})").format(
            self.stage, self.same_child
        )

    def is_clean(self, text: sql.Composable, schema: str) -> sql.Composed:
        """True when the record of an id has no event and no failure on this node."""
        return sql.SQL(
            "not exists (select from {} where table_name = {table} and record_id = {id}) "
            "and not exists (select from {} where table_name = {table} and record_id = {id})"
        ).format(
            sql.Identifier(schema, "sync_events"),
            sql.Identifier(schema, "sync_failures"),
            table=self.relation.table,
            id=text,
        )

    @property
    def create_stage(self) -> sql.Composed:
        """Create the staging table of this session."""
        columns = sql.SQL(", ").join(
            sql.SQL(f"c{index} " + ("text" if self.raw else column.type_name))
            for index, column in enumerate(self.relation.columns.values())
        )
        table = sql.SQL(
            "create temporary table if not exists {} (n bigint, present boolean, {}) on commit delete rows"
        ).format(sql.Identifier(self.stage_name), columns)
        if self.raw is None:
            return table
        return sql.SQL("{}; create index if not exists {} on {} (n)").format(
            table, sql.Identifier(f"{self.stage_name}_n"), self.stage
        )

    @property
    def copy_in(self) -> sql.Composed:
        """Load rows into the staging table."""
        if self.raw is None:
            return sql.SQL("copy {} from stdin").format(self.stage)
        return sql.SQL("copy {} from stdin (encoding {})").format(self.stage, self.raw)

    @property
    def read_each(self) -> sql.Composed:
        """Read every value of the records numbered from $1 to $2."""
        return sql.SQL("select count(row({})) from {} as s where s.n between $1 and $2").format(
            sql.SQL(", ").join(self.staged(field) for field in self.relation.fields), self.stage
        )

    @property
    def compared(self) -> list[str]:
        """The fields in which two rows of one key can differ, and that can be written.

        A key of `1.0` and one of `1.00` are equal; an identity that must be generated cannot be updated.
        """
        columns = self.relation.columns
        return [
            field
            for field in self.relation.fields
            if columns[field].identity != "a"
            and (field not in self.relation.key or not columns[field].is_same_when_equal)
        ]

    @property
    def differs(self) -> sql.Composed:
        """True when the user's row `t` is not, to the byte, the staged row `s`."""
        return self._differ("s")

    def _differ(self, other: str) -> sql.Composed:
        """Compare field by field where that says the same as comparing bytes, which costs more."""

        def theirs(field: str) -> sql.Composed:
            return self.staged(field) if other == "s" else self._own(field, other)

        columns = self.relation.columns
        plain = [field for field in self.compared if columns[field].is_same_when_equal]
        others = [field for field in self.compared if field not in plain]
        different = [
            sql.SQL("{} is distinct from {}").format(self._own(field, "t"), theirs(field))
            for field in plain
        ]
        if others:
            different.append(
                sql.SQL("row({})::record operator(pg_catalog.*<>) row({})::record").format(
                    sql.SQL(", ").join(self._own(field, "t") for field in others),
                    sql.SQL(", ").join(map(theirs, others)),
                )
            )
        return sql.SQL("({})").format(
            sql.SQL(" or ").join(different or [sql.SQL("false").format()])
        )

    def _own(self, field: str, alias: str) -> sql.Composed:
        column = self.relation.columns[field]
        base = "" if column.domain is None else "::" + column.type_name
        return sql.SQL(alias + ".{}" + base).format(self.column(field))

    def _met(self, present: LiteralString, *, of_all: bool) -> sql.Composed:
        """True for a user's row `t` and the staged record `s` of its key, of some numbers or `of_all` that there are.

        Of all records with keys of one column: their rows are looked up together, which costs less than a descent of
        the index for each. Without a condition on the numbers the planner knows how many they are, and joins by hash.
        """
        if of_all and self.relation.has_lookup_key:
            [field] = self.relation.key
            return sql.SQL(
                "{same_key} and {present} and t.{key} = any (array(select {value} from {stage} as s where {present}))"
            ).format(
                same_key=self.same_key(),
                present=sql.SQL(present),
                key=self.column(field),
                value=self.staged(field),
                stage=self.stage,
            )
        return sql.SQL("{} and {} and {}").format(self.same_key(), sql.SQL(present), self._numbered)

    def upsert(
        self, number: int, expected: Expected, *, of_all: bool
    ) -> tuple[list[sql.Composed], sql.Composed]:
        """Compose the parts of a WITH that write the present records, and the count of what they wrote.

        New records are inserted, and refused together if one of them exists. Records that are mostly new are inserted,
        and updated where they exist and differ. Others are updated where they differ, then the missing ones inserted;
        that insert is skipped when the update met every record: as many as there are numbers, or else as are present.
        """
        payload = self.compared
        if expected == "new":
            return self._insert(number, sql.SQL("true"), sql.SQL(""))
        if not payload or (expected == "mostly new" and not self.relation.key_is_deferrable):
            return self._insert(number, sql.SQL("true"), self._on_conflict(payload))
        updated = sql.SQL(f"updated_{number}")
        update = sql.SQL(
            "{name} as (update {target} as t set {assignments} from {stage} as s "
            "where {met} and {differs} returning 1)"
        ).format(
            name=updated,
            target=self.target,
            assignments=sql.SQL(", ").join(
                sql.SQL("{} = {}").format(self.column(field), self.staged(field))
                for field in payload
            ),
            stage=self.stage,
            met=self._met("s.present", of_all=of_all),
            differs=self.differs,
        )
        missing = sql.SQL(
            "(select count(*) from {updated}) < {last} - {first} + 1 "
            "and (select count(*) from {updated}) < (select count(*) from {stage} as s where {chosen}) "
            "and not exists (select from {target} as t where {same_key})"
        ).format(
            updated=updated,
            first=sql.SQL(self.first),
            last=sql.SQL(self.last),
            stage=self.stage,
            chosen=self._chosen,
            target=self.target,
            same_key=self.same_key(),
        )
        insert, inserted = self._insert(number, missing, self._on_conflict(payload))
        count = sql.SQL("(select count(*) from {}) + {}").format(updated, inserted)
        return [update, *insert], count

    def _on_conflict(self, payload: list[str]) -> sql.Composable:
        if self.relation.key_is_deferrable:
            return sql.SQL("")
        key = sql.SQL(", ").join(self.column(field) for field in self.relation.key)
        action: sql.Composable = sql.SQL("do nothing")
        if payload:
            action = sql.SQL("do update set {} where {}").format(
                sql.SQL(", ").join(
                    sql.SQL("{0} = excluded.{0}").format(self.column(field)) for field in payload
                ),
                self._differ("excluded"),
            )
        return sql.SQL("on conflict ({}) {}").format(key, action)

    def _insert(
        self, number: int, condition: sql.Composable, conflict: sql.Composable
    ) -> tuple[list[sql.Composed], sql.Composed]:
        name = sql.SQL(f"inserted_{number}")
        part = sql.SQL(
            "{name} as (insert into {target} as t ({columns}) overriding system value "
            "select {values} from {stage} as s where {chosen} and {condition} order by s.n {conflict} returning 1)"
        ).format(
            name=name,
            target=self.target,
            columns=sql.SQL(", ").join(self.column(field) for field in self.relation.fields),
            values=sql.SQL(", ").join(self.staged(field) for field in self.relation.fields),
            stage=self.stage,
            chosen=self._chosen,
            condition=condition,
            conflict=conflict,
        )
        return [part], sql.SQL("(select count(*) from {})").format(name)

    def delete(self, number: int, *, of_all: bool) -> tuple[list[sql.Composed], sql.Composed]:
        """Compose the part of a WITH that deletes the records that are gone, and its count."""
        name = sql.SQL(f"deleted_{number}")
        part = sql.SQL("{} as (delete from {} as t using {} as s where {} returning 1)").format(
            name, self.target, self.stage, self._met("not s.present", of_all=of_all)
        )
        return [part], sql.SQL("(select count(*) from {})").format(name)

    @property
    def lock_gone(self) -> sql.Composed:
        """Lock the rows that are about to be deleted, so that no child can be added to them meanwhile."""
        return sql.SQL(
            "select count(*) from (select 1 from {} as t join {} as s on {} "
            "where not s.present order by s.n for update of t) as locked"
        ).format(self.target, self.stage, self.same_key())

    def still_referenced(
        self, child: "TableStatements", key: ForeignKey, *, child_is_staged: bool
    ) -> sql.Composed:
        """Return number and id of records about to be deleted that a row of `child` still refers to."""
        going: sql.Composable = sql.SQL("")
        if child_is_staged:
            going = sql.SQL(
                " and not exists (select from {} as g where not g.present and {})"
            ).format(child.stage, child.same_child)
        return self._gone_but_referenced(sql.Identifier(*key.child), _reference(key), going)

    def referenced_by(self, child: "TableStatements", key: ForeignKey) -> sql.Composed:
        """Return number and id of records about to be deleted that some rows of `child` still refer to."""
        some = sql.SQL(" and {} = any (%(record_ids)s::text[])").format(child.child_id)
        return self._gone_but_referenced(sql.Identifier(*key.child), _reference(key), some)

    def referenced_from(
        self, child: sql.Identifier, columns: list[str], own_columns: list[str]
    ) -> sql.Composed:
        """Return number and id of records about to be deleted that a row of a table which is not synced refers to."""
        reference = sql.SQL(" and ").join(
            sql.SQL("c.{} = t.{}").format(sql.Identifier(mine), sql.Identifier(theirs))
            for mine, theirs in zip(columns, own_columns, strict=True)
        )
        return self._gone_but_referenced(child, reference, sql.SQL(""))

    def _gone_but_referenced(
        self, child: sql.Identifier, reference: sql.Composed, going: sql.Composable
    ) -> sql.Composed:
        return sql.SQL(
            "select s.n, {record_id} from {stage} as s join {target} as t on {same_key} "
            "where not s.present and exists (select from {child} as c where {reference}{going}) order by s.n"
        ).format(
            record_id=self.record_id,
            stage=self.stage,
            target=self.target,
            same_key=self.same_key(),
            child=child,
            reference=reference,
            going=going,
        )

    def children_left(
        self, child: "TableStatements", key: ForeignKey, schema: str, *, child_is_staged: bool
    ) -> sql.Composed:
        """Return the ids of clean rows of `child`, not staged, that refer to records about to be deleted."""
        return sql.SQL(
            "select distinct {child_id} from {stage} as s join {target} as t on {same_key} "
            "join {child} as c on {reference} where not s.present{staged} and {is_clean}"
        ).format(
            child_id=child.child_id,
            stage=self.stage,
            target=self.target,
            same_key=self.same_key(),
            child=sql.Identifier(*key.child),
            reference=_reference(key),
            staged=child.not_staged if child_is_staged else sql.SQL(""),
            is_clean=child.is_clean(child.child_id, schema),
        )

    def followers(
        self, child: "TableStatements", key: ForeignKey, schema: str, *, child_is_staged: bool
    ) -> sql.Composed:
        """Return the ids of clean rows of `child`, not staged, that refer to a value which staged records change.

        One parent after the other, as PostgreSQL itself looks for them.
        """
        return sql.SQL(
            "select distinct {child_id} from (select t.* from {stage} as s join {target} as t on {same_key} "
            "where s.present and ({moved}) offset 0) as t "
            "cross join lateral (select * from {child} as c where {reference} offset 0) as c "
            "where {is_clean}{staged}"
        ).format(
            child_id=child.child_id,
            stage=self.stage,
            target=self.target,
            same_key=self.same_key(),
            moved=sql.SQL(" or ").join(
                sql.SQL("{} is distinct from {}").format(self._own(field, "t"), self.staged(field))
                for field in key.parent_fields
            ),
            child=sql.Identifier(*key.child),
            reference=_reference(key),
            is_clean=child.is_clean(child.child_id, schema),
            staged=child.not_staged if child_is_staged else sql.SQL(""),
        )

    def mark_children(
        self, child: "TableStatements", key: ForeignKey, schema: str, *, child_is_staged: bool
    ) -> sql.Composed:
        """Mark the clean rows of `child`, not staged, that refer to some records which stay: they are sent from here.

        What is staged is the source's, also where it was refused, and what is not clean is sent anyway.
        """
        return sql.SQL(
            "insert into {events} (table_name, record_id, event_type, caused_by) "
            "select {table}, record_id, 'insert', pg_catalog.pg_current_xact_id() "
            "from ({left} and {among}) as children (record_id) where record_id <> all (%(refused)s::text[])"
        ).format(
            events=sql.Identifier(schema, "sync_events"),
            table=child.relation.table,
            left=self.children_left(child, key, schema, child_is_staged=child_is_staged),
            among=AMONG,
        )

    def values_of_gone(self, columns: Sequence[str]) -> sql.Composed:
        """Return some columns, as text, of the rows about to be deleted that have a value in each."""
        values = [sql.SQL("t.{}").format(sql.Identifier(column)) for column in columns]
        return sql.SQL(
            "select {texts} from {stage} as s join {target} as t on {same_key} where not s.present and {given}"
        ).format(
            texts=sql.SQL(", ").join(sql.SQL("{}::text").format(value) for value in values),
            stage=self.stage,
            target=self.target,
            same_key=self.same_key(),
            given=sql.SQL(" and ").join(
                sql.SQL("{} is not null").format(value) for value in values
            ),
        )

    def missing_parents(
        self, parent: "TableStatements", key: ForeignKey, *, parent_is_staged: bool
    ) -> sql.Composed:
        """Return the key values, as text, of parents that staged rows refer to and the target does not have."""
        staged: sql.Composable = sql.SQL("")
        if parent_is_staged:
            staged = sql.SQL(" and not exists (select from {} as p where p.present and {})").format(
                parent.stage, self._same_parent(parent, key, "p")
            )
        return sql.SQL("select distinct {} from {} as s where {}{}").format(
            sql.SQL(", ").join(
                sql.SQL("({})::text").format(self.staged(field)) for field in key.fields
            ),
            self.stage,
            self._is_orphan(parent, key),
            staged,
        )

    def orphans(
        self, parent: "TableStatements", key: ForeignKey, *, parent_is_staged: bool
    ) -> sql.Composed:
        """Return the numbers of staged records whose parent the target does not have, and the parent's, if staged."""
        number: sql.Composable = sql.SQL("null::bigint")
        staged: sql.Composable = sql.SQL("")
        if parent_is_staged:
            number = sql.SQL("g.n")
            staged = sql.SQL(" left join {} as g on g.present and {}").format(
                parent.stage, self._same_parent(parent, key, "g")
            )
        return sql.SQL("select s.n, {} from {} as s{} where {}").format(
            number, self.stage, staged, self._is_orphan(parent, key)
        )

    def _is_orphan(self, parent: "TableStatements", key: ForeignKey) -> sql.Composed:
        """True for a staged record `s` whose parent the target does not have."""
        mine = [self.staged(field) for field in key.fields]
        return sql.SQL("s.present and {} and not exists (select from {} as p where {})").format(
            sql.SQL(" and ").join(sql.SQL("{} is not null").format(value) for value in mine),
            parent.target,
            sql.SQL(" and ").join(
                sql.SQL("p.{} = {}").format(parent.column(theirs), value)
                for theirs, value in zip(key.parent_fields, mine, strict=True)
            ),
        )

    def _same_parent(self, parent: "TableStatements", key: ForeignKey, alias: str) -> sql.Composed:
        """The join of a staged record `s` with the staged row of its parent."""
        return sql.SQL(" and ").join(
            sql.SQL("{} = {}").format(parent.staged(theirs, alias), self.staged(mine))
            for theirs, mine in zip(key.parent_fields, key.fields, strict=True)
        )

    def against(self, checks: list[str]) -> sql.Composed:
        """Return the numbers of staged records for which one of the table's own checks is false.

        A check names plain columns, so it stands where only the columns of the record are in sight.
        """
        columns = sql.SQL(", ").join(
            sql.SQL("{} as {}").format(self.staged(field), self.column(field))
            for field in self.relation.fields
        )
        return sql.SQL(
            'select "staged n" from (select s.n as "staged n", {} from {} as s where s.present) as staged where {}'
        ).format(
            columns,
            self.stage,
            sql.SQL(" or ").join(sql.SQL(f"({check}) is false") for check in checks),
        )

    def fill_from(self, other: "TableStatements") -> sql.Composed:
        """Copy some records of another staging table into this one."""
        return sql.SQL(
            "insert into {} select * from {} where n = any (%(numbers)s::bigint[])"
        ).format(self.stage, other.stage)

    @property
    def drop_stage(self) -> sql.Composed:
        """Drop the staging table."""
        return sql.SQL("drop table {}").format(self.stage)

    @property
    def sit_out(self) -> sql.Composed:
        """Leave some records out of what follows; they stay staged, so that they can still be named."""
        return sql.SQL("update {} set present = null where n = any (%(numbers)s::bigint[])").format(
            self.stage
        )

    @property
    def sit_in(self) -> sql.Composed:
        """Take in again records that are there on the source."""
        return sql.SQL("update {} set present = true where n = any (%(numbers)s::bigint[])").format(
            self.stage
        )

    @property
    def go_again(self) -> sql.Composed:
        """Take in again records that are gone on the source."""
        return sql.SQL(
            "update {} set present = false where n = any (%(numbers)s::bigint[])"
        ).format(self.stage)

    @property
    def ids_of(self) -> sql.Composed:
        """Return number and id of some staged records; of raw ones the UTF-8 of the id."""
        return sql.SQL(
            "select s.n, {} from {} as s where s.n = any (%(numbers)s::bigint[])"
        ).format(self._bytes_of_id, self.stage)

    @property
    def gone_among(self) -> sql.Composed:
        """Return the numbers of those of some staged records that are gone on the source."""
        return sql.SQL(
            "select n from {} where n = any (%(numbers)s::bigint[]) and not present"
        ).format(self.stage)

    @property
    def unstage(self) -> sql.Composed:
        """Take some records out of the batch."""
        return sql.SQL("delete from {} where n = any (%(numbers)s::bigint[])").format(self.stage)

    @property
    def unstage_repeated(self) -> sql.Composed:
        """Take records with numbers from `first` on out of the batch that it has already."""
        return sql.SQL(
            "delete from {stage} as s using {stage} as b where s.n >= %(first)s and b.n < %(first)s and {same_key}"
        ).format(
            stage=self.stage,
            same_key=sql.SQL(" and ").join(
                sql.SQL(f"s.c{index} = b.c{index}") for index in range(len(self.relation.key))
            ),
        )

    def unstage_dirty(self, schema: str) -> sql.Composed:
        """Take records with numbers from `first` on out of the batch that have events or a failure on the target."""
        return sql.SQL(
            "delete from {stage} as s using ("
            "select record_id from {events} where table_name = {table} "
            "union all select record_id from {failures} where table_name = {table}"
            ") as waiting where s.n >= %(first)s and waiting.record_id = {record_id}"
        ).format(
            stage=self.stage,
            events=sql.Identifier(schema, "sync_events"),
            failures=sql.Identifier(schema, "sync_failures"),
            table=self.relation.table,
            record_id=self.record_id,
        )

    def as_row(self, alias: str) -> sql.Composed:
        """The fields of `t` (the user's row) or `s` (the staged row), as one jsonb object by field name.

        `->>` gives each value as a text that is read as the same value again.
        """
        fields = sql.SQL(", ").join(
            sql.SQL("{}{} as {}").format(
                sql.SQL("t.{}").format(self.column(field)) if alias == "t" else self.staged(field),
                sql.SQL("" if column.type_name in SAME_IN_JSONB else "::text"),
                sql.Identifier(field),
            )
            for field, column in self.relation.columns.items()
        )
        return sql.SQL("(select pg_catalog.to_jsonb(fields) from (select {}) as fields)").format(
            fields
        )

    def stage_logged(self, schema: str, whose: Whose) -> sql.Composed:
        """Stage a row of the log of conflicts as record 1."""
        return sql.SQL("insert into {} select 1, true, {} from {} where id = %(id)s").format(
            self.stage,
            sql.SQL(", ").join(
                sql.SQL("({} ->> {})::" + column.type_name).format(
                    sql.Identifier(f"{whose}_row"), field
                )
                for field, column in self.relation.columns.items()
            ),
            sql.Identifier(schema, "sync_conflicts"),
        )


def _reference(key: ForeignKey) -> sql.Composed:
    """True when the child `c` refers to the parent `t`."""
    return sql.SQL(" and ").join(
        sql.SQL("c.{} = t.{}{}").format(
            sql.Identifier(mine),
            sql.Identifier(theirs),
            sql.SQL(" collate {}").format(sql.Identifier(*collation)) if collation else sql.SQL(""),
        )
        for mine, theirs, collation in zip(
            key.columns, key.parent_columns, key.collations, strict=True
        )
    )
