-- Every query of the engine that names no table of the user. `{schema}` is the pipeline's schema.

-- name: read_catalog
-- One row for each asked name: the relation with its columns, indexes, foreign keys and partitions, or nulls.
select
    asked.position,
    class.oid::bigint as oid,
    namespace.nspname as schema_name,
    class.relname as table_name,
    class.relkind::text as kind,
    -- As in `read_moment`.
    pg_catalog.concat_ws(' ', class.relnamespace, class.relname, class.relnatts, (
        select max(trigger.oid) from pg_catalog.pg_trigger as trigger where trigger.tgrelid = class.oid
    )) as shape,
    class.relrowsecurity
        and (class.relforcerowsecurity or not pg_catalog.pg_has_role(class.relowner, 'usage'))
        and not (select rolbypassrls or rolsuper from pg_catalog.pg_roles where rolname = current_user)
        as row_security,
    (
        select array_agg(needed.privilege order by needed.position)
        from unnest(array['select', 'insert', 'update', 'delete']) with ordinality as needed (privilege, position)
        where not case when needed.privilege = 'delete' then pg_catalog.has_table_privilege(class.oid, 'delete')
            else pg_catalog.has_any_column_privilege(class.oid, needed.privilege) end
    ) as lacking,
    -- Enabled triggers of the pipeline, on the table and its partitions.
    (
        select sum((
            select count(*) from pg_catalog.pg_trigger as trigger
            where trigger.tgrelid = part.oid and trigger.tgfoid = function.oid and trigger.tgenabled in ('O', 'A')
        ))::integer
        from (select class.oid union select relid from pg_catalog.pg_partition_tree(class.oid)) as part (oid)
    ) as captures,
    function.prosrc as capture_body,
    exists (
        select from pg_catalog.pg_inherits as inherited
        where inherited.inhrelid = class.oid or (inherited.inhparent = class.oid and class.relkind = 'r')
    ) as inherits,
    class.relispartition as is_partition,
    (
        select min(rule.rulename::text) from pg_catalog.pg_rewrite as rule
        where rule.ev_class = class.oid and rule.ev_enabled <> 'D'
    ) as rule,
    (
        select coalesce(pg_catalog.jsonb_agg(
            pg_catalog.jsonb_build_object(
                'name', attribute.attname,
                -- A type of the users' own with its schema: it means the same whatever is searched.
                'type', case when base.typnamespace = 'pg_catalog'::regnamespace
                    then pg_catalog.format_type(base.oid, -1)
                    else pg_catalog.format('%%s.%%I', base.typnamespace::regnamespace, base.typname) end,
                'formatted', pg_catalog.format_type(attribute.atttypid, attribute.atttypmod),
                'domain', case when base.oid <> attribute.atttypid
                    then pg_catalog.format_type(attribute.atttypid, null) end,
                'not_null', attribute.attnotnull,
                'generated', attribute.attgenerated <> '',
                'identity', attribute.attidentity::text,
                'collation', (
                    select pg_catalog.quote_ident(collation_namespace.nspname)
                        || '.' || pg_catalog.quote_ident(loose.collname)
                    from pg_catalog.pg_collation as loose
                    join pg_catalog.pg_namespace as collation_namespace
                        on collation_namespace.oid = loose.collnamespace
                    where loose.oid = attribute.attcollation and not loose.collisdeterministic
                )
            ) order by attribute.attnum
        ), '[]')
        from pg_catalog.pg_attribute as attribute
        cross join lateral (
            with recursive unwrapped as (
                select type.oid, type.typtype, type.typbasetype, type.typnamespace, type.typname
                from pg_catalog.pg_type as type
                where type.oid = attribute.atttypid
                union all
                select type.oid, type.typtype, type.typbasetype, type.typnamespace, type.typname
                from unwrapped
                join pg_catalog.pg_type as type on type.oid = unwrapped.typbasetype
                where unwrapped.typtype = 'd'
            )
            select oid, typnamespace, typname from unwrapped where typtype <> 'd'
        ) as base
        where attribute.attrelid = class.oid and attribute.attnum > 0 and not attribute.attisdropped
    ) as columns,
    (
        select coalesce(pg_catalog.jsonb_agg(
            pg_catalog.jsonb_build_object(
                'primary', index.indisprimary,
                'deferrable', not index.indimmediate,
                -- A key WITHOUT OVERLAPS is an exclusion constraint.
                'plain', index.indpred is null and index.indexprs is null and index.indisvalid
                    and not index.indisexclusion,
                'columns', (
                    select coalesce(pg_catalog.jsonb_agg(attribute.attname order by part.position), '[]')
                    from unnest(index.indkey::smallint[]) with ordinality as part (attnum, position)
                    join pg_catalog.pg_attribute as attribute
                        on attribute.attrelid = class.oid and attribute.attnum = part.attnum
                    where part.position <= index.indnkeyatts
                )
            ) order by index.indisprimary desc, index.indexrelid
        ), '[]')
        from pg_catalog.pg_index as index
        where index.indrelid = class.oid and index.indisunique
    ) as unique_indexes,
    (
        select coalesce(pg_catalog.jsonb_agg(
            pg_catalog.jsonb_build_object(
                'schema', child_namespace.nspname,
                'table', child.relname,
                'parent', coalesce(pg_catalog.pg_partition_root(reference.confrelid), reference.confrelid)::oid::bigint,
                'cascades', reference.confdeltype = 'c',
                'follows', reference.confupdtype in ('c', 'n', 'd'),
                'columns', (
                    select pg_catalog.jsonb_agg(attribute.attname order by part.position)
                    from unnest(reference.conkey) with ordinality as part (attnum, position)
                    join pg_catalog.pg_attribute as attribute
                        on attribute.attrelid = reference.conrelid and attribute.attnum = part.attnum
                ),
                'parent_columns', (
                    select pg_catalog.jsonb_agg(attribute.attname order by part.position)
                    from unnest(reference.confkey) with ordinality as part (attnum, position)
                    join pg_catalog.pg_attribute as attribute
                        on attribute.attrelid = reference.confrelid and attribute.attnum = part.attnum
                ),
                -- Where the two columns have not the same: by which they are compared. An index of the child has its own.
                'collations', (
                    select pg_catalog.jsonb_agg(case when mine.attcollation <> theirs.attcollation then (
                        select pg_catalog.jsonb_build_array(collation_namespace.nspname, used.collname)
                        from pg_catalog.pg_collation as used
                        join pg_catalog.pg_namespace as collation_namespace
                            on collation_namespace.oid = used.collnamespace
                        where used.oid in (mine.attcollation, theirs.attcollation)
                        order by used.collisdeterministic, used.oid = theirs.attcollation
                        limit 1
                    ) end order by part.position)
                    from unnest(reference.conkey, reference.confkey) with ordinality
                        as part (attnum, parent_attnum, position)
                    join pg_catalog.pg_attribute as mine
                        on mine.attrelid = reference.conrelid and mine.attnum = part.attnum
                    join pg_catalog.pg_attribute as theirs
                        on theirs.attrelid = reference.confrelid and theirs.attnum = part.parent_attnum
                )
            ) order by reference.conname, child_namespace.nspname, child.relname
        ), '[]')
        from (
            select class.oid union select relid from pg_catalog.pg_partition_tree(class.oid)
        ) as part (oid)
        join pg_catalog.pg_constraint as reference on reference.conrelid = part.oid
        join pg_catalog.pg_class as child on child.oid = part.oid
        join pg_catalog.pg_namespace as child_namespace on child_namespace.oid = child.relnamespace
        where reference.contype = 'f' and reference.conparentid = 0
            -- From PostgreSQL 18 on a key may be there only for the planner.
            and coalesce((pg_catalog.to_jsonb(reference) ->> 'conenforced')::boolean, true)
    ) as foreign_keys,
    -- Of any table: a key of one that refers to this one may wait as well, and cascades and triggers reach others.
    exists (select from pg_catalog.pg_constraint as constrained where constrained.condeferrable)
        as deferrable_constraints,
    (
        select coalesce(pg_catalog.jsonb_agg(
            pg_catalog.jsonb_build_array(part_namespace.nspname, part_class.relname)
            order by part_namespace.nspname, part_class.relname
        ), '[]')
        from pg_catalog.pg_partition_tree(class.oid) as tree
        join pg_catalog.pg_class as part_class on part_class.oid = tree.relid
        join pg_catalog.pg_namespace as part_namespace on part_namespace.oid = part_class.relnamespace
        where tree.relid <> class.oid
    ) as partitions
from unnest(%(schemas)s::text[], %(names)s::text[], %(functions)s::text[])
    with ordinality as asked (schema_name, table_name, function_name, position)
left join pg_catalog.pg_class as class
    on class.oid = pg_catalog.to_regclass(
        coalesce(pg_catalog.quote_ident(asked.schema_name) || '.', '') || pg_catalog.quote_ident(asked.table_name)
    )
left join pg_catalog.pg_namespace as namespace on namespace.oid = class.relnamespace
left join pg_catalog.pg_proc as function
    on function.proname = asked.function_name::name and function.pronargs = 0
        and function.pronamespace = (select pg_catalog.to_regnamespace(pg_catalog.quote_ident(%(own_schema)s)))
order by asked.position

-- name: list_tables
-- Every table of the applications: no system's, no extension's, no pipeline's, no partition; what could be its key if it
-- has no primary key; which unique columns join others, if its primary key is but a number that nothing refers to; and
-- what it refers to.
select
    namespace.nspname as schema_name,
    class.relname as table_name,
    pg_catalog.pg_table_is_visible(class.oid) as visible,
    coalesce((
        select array(
            select attribute.attname::text
            from unnest(index.indkey::smallint[]) with ordinality as part (attnum, position)
            join pg_catalog.pg_attribute as attribute
                on attribute.attrelid = class.oid and attribute.attnum = part.attnum and attribute.attnotnull
            where part.position <= index.indnkeyatts
            order by part.position
        )
        from pg_catalog.pg_index as index
        where index.indrelid = class.oid and index.indisunique and index.indisvalid and index.indimmediate
            and not index.indisexclusion and index.indpred is null and index.indexprs is null
            and not exists (select from pg_catalog.pg_index where indrelid = class.oid and indisprimary)
            and not exists (
                select
                from unnest(index.indkey::smallint[]) with ordinality as part (attnum, position)
                join pg_catalog.pg_attribute as attribute
                    on attribute.attrelid = class.oid and attribute.attnum = part.attnum
                where part.position <= index.indnkeyatts and not attribute.attnotnull
            )
        order by index.indnkeyatts, index.indexrelid
        limit 1
    ), '{}') as key,
    coalesce((
        select array(
            select attribute.attname::text
            from unnest(index.indkey::smallint[]) with ordinality as part (attnum, position)
            join pg_catalog.pg_attribute as attribute
                on attribute.attrelid = class.oid and attribute.attnum = part.attnum
            where part.position <= index.indnkeyatts
            order by part.position
        )
        from pg_catalog.pg_index as index
        where index.indrelid = class.oid and index.indisunique and index.indisvalid and index.indimmediate
            and not index.indisprimary and index.indpred is null and index.indexprs is null
            and not exists (
                select
                from unnest(index.indkey::smallint[]) with ordinality as part (attnum, position)
                join pg_catalog.pg_attribute as attribute
                    on attribute.attrelid = class.oid and attribute.attnum = part.attnum
                where part.position <= index.indnkeyatts and not (
                    attribute.attnotnull
                    and exists (
                        select from pg_catalog.pg_constraint as reference
                        where reference.conrelid = class.oid and reference.contype = 'f'
                            and part.attnum = any (reference.conkey)
                    )
                )
            )
            and exists (
                select from pg_catalog.pg_index as main
                join pg_catalog.pg_attribute as attribute
                    on attribute.attrelid = class.oid and attribute.attnum = main.indkey[0]
                where main.indrelid = class.oid and main.indisprimary and main.indnkeyatts = 1
                    and (attribute.atthasdef or attribute.attidentity <> '')
                    and attribute.attnum <> all (index.indkey::smallint[])
            )
            and not exists (
                select from pg_catalog.pg_constraint as reference
                where reference.confrelid = class.oid and reference.contype = 'f'
            )
        order by index.indnkeyatts, index.indexrelid
        limit 1
    ), '{}') as joined,
    array(
        select distinct parent_namespace.nspname || '.' || parent.relname
        from pg_catalog.pg_constraint as reference
        join pg_catalog.pg_class as parent on parent.oid = reference.confrelid
        join pg_catalog.pg_namespace as parent_namespace on parent_namespace.oid = parent.relnamespace
        where reference.conrelid = class.oid and reference.contype = 'f' and reference.conparentid = 0
        order by 1
    ) as parents
from pg_catalog.pg_class as class
join pg_catalog.pg_namespace as namespace on namespace.oid = class.relnamespace
where class.relkind in ('r', 'p')
    and not class.relispartition
    and class.relpersistence <> 't'
    and namespace.nspname <> 'information_schema'
    and namespace.nspname !~ '^pg_'
    and not exists (
        select from pg_catalog.pg_class as own
        where own.relnamespace = class.relnamespace and own.relname = 'sync_migrations'
    )
    and not exists (
        select from pg_catalog.pg_depend as member
        where member.classid = 'pg_catalog.pg_class'::regclass
            and member.objid = class.oid
            and member.deptype = 'e'
    )
order by namespace.nspname, class.relname

-- name: read_unique_indexes
-- The unique and excluding indexes of a table: what each holds, which columns it is made of, whether it is checked at once.
with made_of as (
    -- A generated column stands for the columns that it is computed from.
    select
        index.indexrelid,
        array_agg(distinct coalesce(base.attname, attribute.attname)::text) as columns,
        pg_catalog.jsonb_object_agg(
            attribute.attname, pg_catalog.pg_get_expr(attrdef.adbin, attrdef.adrelid)
        ) filter (where attribute.attgenerated <> '') as generated
    from pg_catalog.pg_index as index
    join pg_catalog.pg_attribute as attribute
        on attribute.attrelid = index.indrelid and attribute.attnum > 0 and not attribute.attisdropped
    left join pg_catalog.pg_attrdef as attrdef
        on attrdef.adrelid = attribute.attrelid
        and attrdef.adnum = attribute.attnum
        and attribute.attgenerated <> ''
    left join pg_catalog.pg_depend as computed
        on computed.refclassid = 'pg_catalog.pg_class'::regclass
        and computed.refobjid = attribute.attrelid
        and computed.refobjsubid > 0
        and computed.refobjsubid <> attribute.attnum
        and (
            (computed.classid = 'pg_catalog.pg_attrdef'::regclass and computed.objid = attrdef.oid)
            -- So it was before PostgreSQL 15.
            or (
                attrdef.oid is not null
                and computed.classid = 'pg_catalog.pg_class'::regclass
                and computed.objid = attribute.attrelid
                and computed.objsubid = attribute.attnum
            )
        )
    left join pg_catalog.pg_attribute as base
        on base.attrelid = attribute.attrelid and base.attnum = computed.refobjsubid
    where index.indrelid = %(oid)s
        and (
            attribute.attnum = any (index.indkey::smallint[])
            or exists (
                select from pg_catalog.pg_depend as used
                where used.classid = 'pg_catalog.pg_class'::regclass
                    and used.objid = index.indexrelid
                    and used.refclassid = 'pg_catalog.pg_class'::regclass
                    and used.refobjid = index.indrelid
                    and used.refobjsubid = attribute.attnum
            )
        )
    group by index.indexrelid
)
select
    index.indimmediate as immediate,
    (
        select pg_catalog.array_agg(pg_catalog.pg_get_indexdef(index.indexrelid, position, false) order by position)
        from pg_catalog.generate_series(1, index.indnkeyatts::integer) as position
    ) as expressions,
    pg_catalog.pg_get_expr(index.indpred, index.indrelid) as predicate,
    -- Before PostgreSQL 15 there is no such column.
    coalesce((pg_catalog.to_jsonb(index) ->> 'indnullsnotdistinct')::boolean, false) as nulls_not_distinct,
    -- How values are compared, where two that are compared so exclude each other.
    (
        select array_agg(
            'operator(' || pg_catalog.quote_ident(namespace.nspname) || '.' || operator.oprname || ')'
            order by part.position
        )
        from pg_catalog.pg_constraint as constrained
        cross join unnest(constrained.conexclop) with ordinality as part (oid, position)
        join pg_catalog.pg_operator as operator on operator.oid = part.oid
        join pg_catalog.pg_namespace as namespace on namespace.oid = operator.oprnamespace
        where constrained.conindid = index.indexrelid and constrained.contype in ('x', 'u', 'p')
    ) as operators,
    made_of.columns,
    (
        select array_agg(attribute.attname::text)
        from unnest(index.indkey::smallint[]) with ordinality as part (attnum, position)
        left join pg_catalog.pg_attribute as attribute
            on attribute.attrelid = index.indrelid and attribute.attnum = part.attnum
        where part.position <= index.indnkeyatts
        having bool_and(part.attnum <> 0)
    ) as plain,
    coalesce(made_of.generated, '{}') as generated,
    array(
        select attribute.attname::text
        from pg_catalog.pg_constraint as reference
        join pg_catalog.pg_attribute as attribute
            on attribute.attrelid = index.indrelid and attribute.attnum = any (reference.confkey)
        where reference.confrelid = index.indrelid and reference.contype = 'f'
            -- Children that follow every change come back; where the check can wait, it never sees the change.
            and reference.confupdtype <> 'c'
            and not (reference.confupdtype = 'a' and reference.condeferrable)
    ) as referenced,
    array(
        select attribute.attname::text
        from pg_catalog.pg_constraint as reference
        join pg_catalog.pg_attribute as attribute
            on attribute.attrelid = index.indrelid and attribute.attnum = any (reference.confkey)
        where reference.confrelid = index.indrelid and reference.contype = 'f' and reference.confupdtype = 'c'
    ) as followed,
    array(
        select attribute.attname::text
        from pg_catalog.pg_constraint as reference
        join pg_catalog.pg_attribute as attribute
            on attribute.attrelid = index.indrelid and attribute.attnum = any (reference.conkey)
        where reference.conrelid = index.indrelid and reference.contype = 'f'
    ) as referring
from pg_catalog.pg_index as index
join made_of using (indexrelid)
where (index.indisunique or index.indisexclusion) and index.indisvalid
order by index.indexrelid

-- name: read_absent_children
-- Foreign keys to a table from captured tables that are left out for now, with their columns and the parent's.
select
    namespace.nspname as schema_name,
    class.relname as table_name,
    array(
        select attribute.attname::text
        from unnest(reference.conkey) with ordinality as part (attnum, position)
        join pg_catalog.pg_attribute as attribute
            on attribute.attrelid = reference.conrelid and attribute.attnum = part.attnum
        order by part.position
    ) as columns,
    array(
        select attribute.attname::text
        from unnest(reference.confkey) with ordinality as part (attnum, position)
        join pg_catalog.pg_attribute as attribute
            on attribute.attrelid = reference.confrelid and attribute.attnum = part.attnum
        order by part.position
    ) as parent_columns
from pg_catalog.pg_constraint as reference
join pg_catalog.pg_class as class on class.oid = reference.conrelid
join pg_catalog.pg_namespace as namespace on namespace.oid = class.relnamespace
where reference.confrelid = %(parent)s
    and reference.contype = 'f'
    and reference.conrelid <> all (%(known)s::oid[])
    and exists (
        select from pg_catalog.pg_trigger as trigger
        join pg_catalog.pg_proc as function on function.oid = trigger.tgfoid
        where trigger.tgrelid = reference.conrelid
            and function.pronamespace = pg_catalog.to_regnamespace('{schema}')
    )

-- name: take_lock
-- True when this session now leads: the node's advisory lock, derived from the pipeline's own schema. Not while a
-- second writer of the last leader lives: its lock must be free, and is given back at once.
select case
    when not pg_catalog.pg_try_advisory_lock(
        pg_catalog.hashtext('sync-pipeline'), pg_catalog.hashtext(%(schema)s)
    ) then false
    when not pg_catalog.pg_try_advisory_lock(
        pg_catalog.hashtext('sync-pipeline second writer'), pg_catalog.hashtext(%(schema)s)
    ) then not pg_catalog.pg_advisory_unlock(
        pg_catalog.hashtext('sync-pipeline'), pg_catalog.hashtext(%(schema)s)
    )
    else pg_catalog.pg_advisory_unlock(
        pg_catalog.hashtext('sync-pipeline second writer'), pg_catalog.hashtext(%(schema)s)
    )
end

-- name: take_second_lock
-- True when this session may now write beside the one that leads, which is to be looked at afterwards.
select pg_catalog.pg_try_advisory_lock(
    pg_catalog.hashtext('sync-pipeline second writer'), pg_catalog.hashtext(%(schema)s)
)

-- name: release_locks
-- Give the locks of this session back; the connection stays.
select pg_catalog.pg_advisory_unlock_all()

-- name: read_leader
-- Who holds the node's lock: process id, application name, client address, since when; or nothing.
select
    locks.pid,
    activity.application_name,
    pg_catalog.host(activity.client_addr) as client_address,
    activity.backend_start
from pg_catalog.pg_locks as locks
left join pg_catalog.pg_stat_activity as activity on activity.pid = locks.pid
where locks.locktype = 'advisory'
    and locks.database = (select oid from pg_catalog.pg_database where datname = pg_catalog.current_database())
    and locks.classid = ((pg_catalog.hashtext('sync-pipeline')::bigint + 4294967296) %% 4294967296)::oid
    and locks.objid = ((pg_catalog.hashtext(%(schema)s)::bigint + 4294967296) %% 4294967296)::oid
    and locks.objsubid = 2
    and locks.granted

-- name: read_blocker
-- The session that the pipeline waits for in this database right now, the one whose transaction is oldest; its process id
-- is 0 for a prepared transaction, and what only its own role may see is null for others.
select
    blocking.pid,
    activity.application_name,
    activity.state,
    extract(epoch from pg_catalog.clock_timestamp() - activity.xact_start)::double precision as seconds
from pg_catalog.pg_stat_activity as waiting
cross join lateral pg_catalog.unnest(pg_catalog.pg_blocking_pids(waiting.pid)) as blocking (pid)
left join pg_catalog.pg_stat_activity as activity on activity.pid = blocking.pid
where waiting.datname = pg_catalog.current_database()
    and waiting.application_name like 'sync-pipeline %%'
    and (activity.application_name like 'sync-pipeline %%') is not true
order by activity.xact_start nulls first, blocking.pid
limit 1

-- name: read_noted
-- Which database install met here, and as which node.
select node, peer, system_identifier, database_oid::bigint as database_oid
from {schema}.sync_node

-- name: read_system_identifier
-- The cluster, for roles that may know.
select system_identifier::text
from pg_catalog.pg_control_system()

-- name: read_database_oid
-- The database, within its cluster.
select oid::bigint
from pg_catalog.pg_database
where datname = pg_catalog.current_database()

-- name: read_moment
-- The node's clock, to bound which events a batch of the ledger may match; is any failure due; what had ended by then;
-- the shapes of some tables: what changes with their names, with a new column, with a new foreign key.
select
    pg_catalog.clock_timestamp() as read_at,
    coalesce((select min(next_attempt_at) from {schema}.sync_failures) <= pg_catalog.clock_timestamp(), false)
        as failures_are_due,
    pg_catalog.pg_snapshot_xmin(pg_catalog.pg_current_snapshot())::text::bigint as oldest_running,
    array(
        select pg_catalog.concat_ws(' ', class.relnamespace, class.relname, class.relnatts, newest.oid)
        from unnest(%(tables)s::oid[]) with ordinality as asked (oid, position)
        left join pg_catalog.pg_class as class on class.oid = asked.oid
        left join (
            select tgrelid, max(oid) as oid from pg_catalog.pg_trigger
            where tgrelid = any (%(tables)s::oid[])
            group by tgrelid
        ) as newest on newest.tgrelid = asked.oid
        order by asked.position
    ) as shapes

-- name: begin_batch
-- Settings of the transaction; the node's clock; the shapes of some tables, as in `read_moment`; is the node paused.
select
    pg_catalog.set_config(%(applying)s, %(schema)s, true),
    pg_catalog.set_config('synchronous_commit', 'off', true),
    pg_catalog.clock_timestamp(),
    array(
        select pg_catalog.concat_ws(' ', class.relnamespace, class.relname, class.relnatts, newest.oid)
        from unnest(%(tables)s::oid[]) with ordinality as asked (oid, position)
        left join pg_catalog.pg_class as class on class.oid = asked.oid
        left join (
            select tgrelid, max(oid) as oid from pg_catalog.pg_trigger
            where tgrelid = any (%(tables)s::oid[])
            group by tgrelid
        ) as newest on newest.tgrelid = asked.oid
        order by asked.position
    ),
    exists (select from {schema}.sync_node where paused_at is not null)

-- name: read_poll
-- What an idle consumer asks: does any event wait above an id or is any failure due; is consumption paused here; and the
-- oldest transaction that runs.
select
    (
        {schema}.has_events($1)
        -- The least comes from the index: failures that are not due are not read, however many there are.
        or coalesce((select min(next_attempt_at) from {schema}.sync_failures) <= pg_catalog.clock_timestamp(), false)
    )::text as waiting,
    (select paused_at is not null from {schema}.sync_node)::text as paused,
    pg_catalog.pg_snapshot_xmin(pg_catalog.pg_current_snapshot())::text as oldest_running

-- name: read_clock
-- The node's clock.
select pg_catalog.clock_timestamp()

-- name: read_next_events
-- The next events after an id, whatever their tables: how many of each table, how many of those inserts, from where to where.
select table_name, events, inserts, first_id, last_id, oldest_at
from {schema}.next_events(%(after_id)s, %(ignored)s::text[], %(at_most)s)

-- name: read_further_events
-- The first and the last of the next events of a table.
select min(id), max(id)
from (
    select id
    from {schema}.sync_events
    where id > %(after_id)s and table_name = %(table_name)s
    order by id
    limit %(at_most)s
) as further

-- name: read_further_failures
-- The next records of a table that are retried.
select record_id
from {schema}.sync_failures
where table_name = %(table_name)s and state = 'retrying' and record_id > %(after)s
order by record_id
limit %(at_most)s

-- name: read_event_ids
-- The ids of events as ranges, where some between the first and the last are missing or not visible yet.
select pg_catalog.range_agg(pg_catalog.int8range(id, id, '[]'))::text
from {schema}.sync_events
where id between %(first_id)s and %(last_id)s
    and table_name <> all (%(ignored)s::text[])

-- name: read_changes
-- For some records of a batch: when they last changed here, whether they were inserted, and their events' ids.
select
    record_id,
    max(changed_at) as changed_at,
    bool_or(event_type = 'insert') as inserted,
    pg_catalog.range_agg(ids)::text as ids
from (
    select
        record_id,
        coalesce(changed_at, created_at) as changed_at,
        event_type,
        pg_catalog.int8range(id, id, '[]') as ids
    from {schema}.sync_events
    where id between %(first_id)s and %(last_id)s
        and table_name = %(table_name)s
        and record_id = any (%(record_ids)s::text[])
    union all
    select record_id, changed_at, event_type, null
    from {schema}.sync_failures
    where table_name = %(table_name)s and record_id = any (%(record_ids)s::text[])
) as changes
group by record_id

-- name: read_record_ids
-- The records of a table, or some of them, that have events in a range of ids, and which.
select record_id, array_agg(id)
from {schema}.sync_events
where id between %(first_id)s and %(last_id)s
    and table_name = %(table_name)s
    and (%(record_ids)s::text[] is null or record_id = any (%(record_ids)s::text[]))
group by record_id

-- name: set_aside
-- Move events of some records, or some of these, to the failures, dead: nothing can be done with them before an operator
-- looks.
with aside as (
    delete from {schema}.sync_events
    where table_name = %(table_name)s
        and (%(ids)s::bigint[] is null or id = any (%(ids)s::bigint[]))
        and (%(record_ids)s::text[] is null or record_id = any (%(record_ids)s::text[]))
    returning record_id, event_type, coalesce(changed_at, created_at) as changed_at
)
insert into {schema}.sync_failures as failure
    (table_name, record_id, state, next_attempt_at, error_class, error, event_type, changed_at)
select
    %(table_name)s, record_id, 'dead', null, %(error_class)s, %(error)s, max(event_type), max(changed_at)
from aside
group by record_id
on conflict (table_name, record_id) do update
set state = 'dead',
    next_attempt_at = null,
    attempts = failure.attempts + 1,
    error_class = excluded.error_class,
    error = excluded.error,
    changed_at = greatest(failure.changed_at, excluded.changed_at),
    last_failed_at = pg_catalog.clock_timestamp()

-- name: bury_invalid_failures
-- Failures that were to be retried and cannot be, also dead ones: their table is unknown or their key is no key.
update {schema}.sync_failures
set state = 'dead',
    next_attempt_at = null,
    error_class = %(error_class)s,
    error = %(error)s,
    last_failed_at = pg_catalog.clock_timestamp()
where table_name = %(table_name)s
    and (%(record_ids)s::text[] is null or record_id = any (%(record_ids)s::text[]))
    and next_attempt_at is not null

-- name: revive_failures
-- Make due what was set aside while its table was not synced. The same SQLSTATE can come from a trigger of the target.
update {schema}.sync_failures
set state = 'retrying',
    next_attempt_at = pg_catalog.clock_timestamp()
where state = 'dead'
    and error_class = '42P01'
    and error like 'no table %% is synced from %%'
    and table_name = any (%(tables)s::text[])

-- name: read_due_failures
-- Some of the records whose next attempt is due, longest first, without those whose events bring them along anyway.
select failure.table_name, failure.record_id
from {schema}.sync_failures as failure
where failure.next_attempt_at <= pg_catalog.clock_timestamp()
    and not exists (
        select
        from {schema}.sync_events as event
        where event.table_name = failure.table_name and event.record_id = failure.record_id
    )
order by failure.next_attempt_at
limit %(at_most)s

-- name: has_failures
-- True when any record of this node failed before.
select exists (select from {schema}.sync_failures)

-- name: acknowledge
-- Delete exactly the events of these ids.
delete from {schema}.sync_events as event
using unnest(%(ids)s::int8multirange) as read_ids
where event.id >= lower(read_ids)
    and event.id < upper(read_ids)

-- name: acknowledge_recovered
-- Delete the events of these ids, none younger than the read: ids can come back after a failover or a restore.
delete from {schema}.sync_events as event
using unnest(%(ids)s::int8multirange) as read_ids
where event.id >= lower(read_ids)
    and event.id < upper(read_ids)
    and event.created_at <= %(read_at)s::timestamptz

-- name: clear_applied_failures
-- Failures of records whose events are in a batch that the target has committed, and those that were retried in it. Who
-- was held is so no longer.
with applied as (
    select event.table_name, event.record_id
    from unnest(%(ids)s::int8multirange) as read_ids
    join {schema}.sync_events as event
        on event.id >= lower(read_ids) and event.id < upper(read_ids)
    where event.created_at <= %(read_at)s::timestamptz
    union
    select failure.table_name, failure.record_id
    from pg_catalog.jsonb_array_elements(%(retried)s::jsonb) as given (record)
    join {schema}.sync_failures as failure
        on failure.table_name = given.record ->> 0 and failure.record_id = given.record ->> 1
    where failure.last_failed_at <= %(read_at)s::timestamptz
),
cleared as (
    delete from {schema}.sync_failures as failure
    using applied
    where failure.table_name = applied.table_name
        and failure.record_id = applied.record_id
    returning failure.table_name, failure.record_id
)
update {schema}.sync_conflicts as conflict
set winner = node.node, resolved_at = pg_catalog.clock_timestamp()
from cleared
cross join {schema}.sync_node as node
where conflict.table_name = cleared.table_name
    and conflict.record_id = cleared.record_id
    and conflict.resolved_at is null

-- name: clear_failures
-- Records that failed before and have now been applied: those of a batch's events, and those retried. If they were held,
-- their conflict is settled, too: for this node, but for those that lost. The limit, which is none, tells the planner how
-- many events there are: few are looked up among many failures, and the other way round.
with applied as (
    select unnest(%(retried)s::text[]) as record_id
    union all
    (
        select record_id
        from {schema}.events_of(%(ids)s::int8multirange, %(table_name)s)
        limit %(events)s
    )
),
cleared as (
    delete from {schema}.sync_failures as failure
    using applied
    where failure.table_name = %(table_name)s
        and failure.record_id = applied.record_id
        and failure.record_id not in (select unnest(%(still_failing)s::text[]))
    returning failure.record_id
)
update {schema}.sync_conflicts as conflict
set winner = case when cleared.record_id = any (%(lost)s::text[]) then node.peer else node.node end,
    resolved_at = pg_catalog.clock_timestamp()
from cleared
cross join {schema}.sync_node as node
where conflict.table_name = %(table_name)s
    and conflict.record_id = cleared.record_id
    and conflict.resolved_at is null

-- name: record_failures
-- Move failing records from the events, whose ids are given, to the failures; the wait doubles from attempt to attempt,
-- with jitter.
-- What failed together is due together. A record that fails in several batches of a pass, which has read the node at one
-- moment, has used up one attempt.
with failing as (
    select record_id, error_class, error, held, position
    from unnest(%(record_ids)s::text[], %(error_classes)s::text[], %(errors)s::text[], %(held)s::boolean[])
        with ordinality as given (record_id, error_class, error, held, position)
),
moved as (
    delete from {schema}.sync_events as event
    using unnest(%(ids)s::text[]) as given (ids)
    cross join unnest(given.ids::int8multirange) as read_ids
    where event.id >= lower(read_ids)
        and event.id < upper(read_ids)
        and event.table_name = %(table_name)s
        and event.record_id = any (%(record_ids)s::text[])
    returning event.record_id, event.event_type, coalesce(event.changed_at, event.created_at) as changed_at
),
changes as (
    select
        record_id,
        case when bool_or(event_type = 'insert') then 'insert' else max(event_type) end as event_type,
        max(changed_at) as changed_at
    from moved
    group by record_id
),
counted as (
    select
        failing.*,
        case
            when before.record_id is null then 1
            when failing.held then before.attempts
            else before.attempts + (before.last_failed_at < %(read_at)s)::integer
        end as attempts,
        before.changed_at
    from failing
    left join {schema}.sync_failures as before
        on before.table_name = %(table_name)s and before.record_id = failing.record_id
)
insert into {schema}.sync_failures as failure
    (table_name, record_id, state, attempts, next_attempt_at, error_class, error, event_type, changed_at)
select
    %(table_name)s,
    counted.record_id,
    case when counted.held then 'held' when counted.attempts >= %(max_attempts)s::integer then 'dead' else 'retrying' end,
    counted.attempts,
    case when not counted.held and counted.attempts < %(max_attempts)s::integer
        then pg_catalog.now() + pg_catalog.make_interval(secs => least(
            %(base_seconds)s * 2.0 ^ least(counted.attempts - 1, 30), %(max_seconds)s
        ) * %(jitter)s::double precision)
    end,
    counted.error_class,
    counted.error,
    coalesce(changes.event_type, 'update'),
    coalesce(changes.changed_at, counted.changed_at, pg_catalog.clock_timestamp())
from counted
left join changes on changes.record_id = counted.record_id
order by counted.position
on conflict (table_name, record_id) do update
set attempts = excluded.attempts,
    state = excluded.state,
    next_attempt_at = excluded.next_attempt_at,
    error_class = excluded.error_class,
    error = excluded.error,
    changed_at = greatest(failure.changed_at, excluded.changed_at),
    last_failed_at = pg_catalog.clock_timestamp()

-- name: subtract_ids
-- Ids without some of them, all as ranges.
select (
    %(ids)s::int8multirange - coalesce(
        (
            select pg_catalog.range_agg(id_range)
            from unnest(%(left_out)s::text[]) as given (ids)
            cross join unnest(given.ids::int8multirange) as id_range
        ),
        '{}'
    )
)::text

-- name: read_checks
-- What a table demands of each of its rows, its checks and that columns are not null, and of which columns.
select
    pg_catalog.pg_get_expr(demanded.conbin, demanded.conrelid),
    array(
        select attribute.attname::text
        from pg_catalog.pg_attribute as attribute
        where attribute.attrelid = demanded.conrelid and attribute.attnum = any (demanded.conkey)
    )
from pg_catalog.pg_constraint as demanded
where demanded.conrelid = %(oid)s and demanded.contype = 'c'
union all
select pg_catalog.format('%%I is not null', attribute.attname), array[attribute.attname::text]
from pg_catalog.pg_attribute as attribute
where attribute.attrelid = %(oid)s
    and attribute.attnum > 0
    and not attribute.attisdropped
    and attribute.attnotnull

-- name: try_each
-- Execute a statement once for each record number; what came of each: rows written, or why the record was refused.
select n, written, error_class, message, detail
from {schema}.try_each(%(statement)s, %(numbers)s::bigint[], %(data_classes)s::text[])

-- name: record_batch
-- Write a batch into the ledger of the target, in the transaction that applies it.
with recorded as (
    insert into {schema}.sync_applied (source, ids, retried, read_at)
    values (%(source)s, %(ids)s::int8multirange, %(retried)s::jsonb, %(read_at)s::timestamptz)
    returning id
)
update {schema}.sync_node
set applied_batch = recorded.id
from recorded
returning recorded.id

-- name: make_durable
-- Write a small record whose commit waits for the disk, and so for all that was committed before it.
select pg_catalog.pg_logical_emit_message(true, 'sync-pipeline', '')

-- name: read_ledger
-- Batches of a source that were committed here and perhaps not acknowledged there.
select id, ids::text as ids, retried::text as retried, read_at::text as read_at
from {schema}.sync_applied
where source = %(source)s
order by id

-- name: forget_batches
-- Remove batches from the ledger once the source has acknowledged them.
with forgotten as (
    delete from {schema}.sync_applied
    where id = any (%(batch_ids)s::bigint[])
)
update {schema}.sync_node
set forgotten_batch = greatest(forgotten_batch, (select max(id) from unnest(%(batch_ids)s::bigint[]) as given (id)))

-- name: note_acknowledged
-- Remember which batch was acknowledged here last, and when; the number of this transaction.
update {schema}.sync_node
set last_pass_at = pg_catalog.clock_timestamp(), acknowledged_batch = greatest(acknowledged_batch, %(batch)s)
returning pg_catalog.pg_current_xact_id()::text::bigint

-- name: forget_peer
-- Know nothing of the other node, which is new or lacks commits.
update {schema}.sync_node
set acknowledged_batch = 0, forgotten_batch = 0

-- name: read_batches
-- Which batches were applied, acknowledged and forgotten here last.
select applied_batch as applied, acknowledged_batch as acknowledged, forgotten_batch as forgotten
from {schema}.sync_node

-- name: has_pending
-- Whether this node itself has marked anything above an id, and whether it has failures: then records may be dirty.
select {schema}.has_events(%(bound)s) as events, exists (select from {schema}.sync_failures) as failures

-- name: read_greatest_event
-- The greatest id of an event that waits here.
select coalesce(max(id), 0) from {schema}.sync_events

-- name: read_least_event
-- The least id above a bound of an event that waits here, null when none does.
select min(id) from {schema}.sync_events where id > %(bound)s

-- name: read_event_writers
-- The transactions of others that have written to the events and still run, prepared ones included, by name.
select coalesce(pg_catalog.array_agg(distinct virtualtransaction), '{}')
from pg_catalog.pg_locks
where locktype = 'relation'
    and database = (select oid from pg_catalog.pg_database where datname = pg_catalog.current_database())
    and relation = pg_catalog.to_regclass(pg_catalog.format('%%I.sync_events', %(schema)s::text))
    and mode = 'RowExclusiveLock'
    and granted
    and pid is distinct from pg_catalog.pg_backend_pid()

-- name: delete_events
-- Delete events by id.
delete from {schema}.sync_events
where id = any (%(ids)s::bigint[])

-- name: delete_failures
-- Forget the failures of some records of a table.
delete from {schema}.sync_failures
where table_name = %(table_name)s and record_id = any (%(record_ids)s::text[])

-- name: hold_records
-- Move the target's own events of held records to its failures: both nodes keep their row until an operator decides.
with moved as (
    delete from {schema}.sync_events as event
    using unnest(%(ids)s::bigint[], %(record_ids)s::text[]) as given (id, record_id)
    where event.id = given.id
    returning given.record_id, event.event_type, coalesce(event.changed_at, event.created_at) as changed_at
)
insert into {schema}.sync_failures as failure
    (table_name, record_id, state, next_attempt_at, error_class, error, event_type, changed_at)
select
    %(table_name)s, record_id, 'held', null, %(error_class)s, %(error)s,
    case when bool_or(event_type = 'insert') then 'insert' else max(event_type) end, max(changed_at)
from moved
group by record_id
on conflict (table_name, record_id) do update
set state = 'held',
    next_attempt_at = null,
    error_class = excluded.error_class,
    error = excluded.error,
    changed_at = greatest(failure.changed_at, excluded.changed_at),
    last_failed_at = pg_catalog.clock_timestamp()

-- name: settle_conflicts
-- Records that were held are so no longer: note who has won; what this node keeps of them is sent.
with decided as (
    select record_id, winner
    from unnest(%(record_ids)s::text[], %(winners)s::text[]) as given (record_id, winner)
),
sent as (
    update {schema}.sync_failures as failure
    set state = 'retrying', next_attempt_at = pg_catalog.clock_timestamp()
    from decided
    where failure.table_name = %(table_name)s
        and failure.record_id = decided.record_id
        and failure.state = 'held'
)
update {schema}.sync_conflicts as conflict
set winner = decided.winner, resolved_at = pg_catalog.clock_timestamp()
from decided
where conflict.table_name = %(table_name)s
    and conflict.record_id = decided.record_id
    and conflict.resolved_at is null

-- name: read_conflict
-- One conflict by its number, and which fields each of its rows has: null where there was no row.
select
    table_name,
    record_id,
    winner,
    resolved_at,
    case when local_row is not null then array(select pg_catalog.jsonb_object_keys(local_row)) end as local_fields,
    case when remote_row is not null then array(select pg_catalog.jsonb_object_keys(remote_row)) end as remote_fields
from {schema}.sync_conflicts
where id = %(id)s

-- name: resolve_conflicts
-- Note an operator's decision on a conflict, and on what is still open for the same record.
update {schema}.sync_conflicts
set winner = %(winner)s, resolved_at = pg_catalog.clock_timestamp()
where id = %(id)s
    or (table_name = %(table_name)s and record_id = %(record_id)s and resolved_at is null)

-- name: release_record
-- Forget the failure of a record that was held here, and marks of commands. A change that came since stays: no pass has
-- seen it, and no operator.
with marks as (
    delete from {schema}.sync_events
    where table_name = %(table_name)s and record_id = %(record_id)s and changed_at is not null
)
delete from {schema}.sync_failures
where table_name = %(table_name)s and record_id = %(record_id)s

-- name: mark_kept
-- Mark records that the target keeps, in the transaction of the batch that would have deleted them: news for the source.
insert into {schema}.sync_events (table_name, record_id, event_type, caused_by)
select %(table_name)s, record_id, 'insert', pg_catalog.pg_current_xact_id()
from unnest(%(record_ids)s::text[]) as given (record_id)

-- name: mark_followers
-- Mark rows that a foreign key changes with their parent, in the transaction of the batch: news for the source, but no
-- change that wins over one of its own.
insert into {schema}.sync_events (table_name, record_id, event_type, caused_by, changed_at)
select %(table_name)s, record_id, 'update', pg_catalog.pg_current_xact_id(), 'epoch'
from unnest(%(record_ids)s::text[]) as given (record_id)

-- name: mark_records
-- Mark records as changed, by their ids.
insert into {schema}.sync_events (table_name, record_id, event_type)
select %(table_name)s, record_id, %(event_type)s
from unnest(%(record_ids)s::text[]) as given (record_id)

-- name: prune_conflicts
-- Delete settled conflicts older than the retention, a bounded number at a time.
delete from {schema}.sync_conflicts
where id in (
    select id
    from {schema}.sync_conflicts
    where resolved_at < pg_catalog.clock_timestamp() - pg_catalog.make_interval(days => %(days)s)
    order by id
    limit 10000
)

-- name: read_status
-- The status view's one row.
select
    node, pending, oldest_at, oldest_seconds, retrying, dead, conflicts_24h, conflicts_held, paused_at, last_pass_at
from {schema}.sync_status

-- name: count_captured
-- How many events were ever written on this node, as its statistics know it: they are a second behind.
select pg_catalog.pg_stat_get_tuples_inserted(class.oid)
from pg_catalog.pg_class as class
where class.relnamespace = pg_catalog.to_regnamespace('{schema}') and class.relname = 'sync_events'

-- name: read_last_failure
-- The failure that was met last, without its message.
select
    table_name,
    record_id,
    error_class,
    extract(epoch from pg_catalog.clock_timestamp() - last_failed_at)::double precision as seconds
from {schema}.sync_failures
order by last_failed_at desc
limit 1

-- name: read_pending
-- The oldest events that wait.
select id, table_name, record_id, event_type, created_at
from {schema}.sync_events
where %(table_name)s::text is null or table_name = %(table_name)s
order by id
limit %(limit)s

-- name: read_failures
-- Failures, oldest first.
select
    table_name, record_id, state, attempts, next_attempt_at, error_class, error, first_failed_at, last_failed_at
from {schema}.sync_failures
where (%(table_name)s::text is null or table_name = %(table_name)s)
    and (%(record_ids)s::text[] is null or record_id = any (%(record_ids)s::text[]))
    and (%(state)s::text is null or state = %(state)s)
order by first_failed_at, table_name, record_id
limit %(limit)s

-- name: retry_failures
-- Make failures due now, dead ones too. Held records wait for a decision on their conflict.
update {schema}.sync_failures
set next_attempt_at = pg_catalog.clock_timestamp()
where (%(table_name)s::text is null or table_name = %(table_name)s)
    and (%(record_ids)s::text[] is null or record_id = any (%(record_ids)s::text[]))
    and (%(state)s::text is null or state = %(state)s)
    and state <> 'held'

-- name: discard_failures
-- Give failures up. Held records wait for a decision on their conflict.
delete from {schema}.sync_failures
where (%(table_name)s::text is null or table_name = %(table_name)s)
    and (%(record_ids)s::text[] is null or record_id = any (%(record_ids)s::text[]))
    and (%(state)s::text is null or state = %(state)s)
    and state <> 'held'

-- name: read_conflicts
-- Conflicts, newest first.
select id, detected_at, table_name, record_id, kind, winner, local_row, remote_row, resolved_at
from {schema}.sync_conflicts
where (%(table_name)s::text is null or table_name = %(table_name)s)
order by id desc
limit %(limit)s

-- name: pause
-- Stop consumption of this link; capture goes on.
update {schema}.sync_node
set paused_at = coalesce(paused_at, pg_catalog.clock_timestamp())

-- name: resume
-- Let consumption go on.
update {schema}.sync_node
set paused_at = null

-- name: count_pending
-- How many events wait, of one table or of all.
select count(*)
from {schema}.sync_events
where %(table_name)s::text is null or table_name = %(table_name)s

-- name: examine_server
-- What doctor asks of a server and its database, in one row.
select
    pg_catalog.current_setting('server_version_num')::integer / 10000 as version,
    pg_catalog.pg_is_in_recovery() as standby,
    pg_catalog.current_setting('default_transaction_read_only')::boolean as read_only,
    pg_catalog.current_setting('server_encoding') as encoding,
    pg_catalog.current_setting('autovacuum')::boolean
        and pg_catalog.current_setting('track_counts')::boolean as autovacuum,
    pg_catalog.current_setting('session_replication_role') as replication_role,
    case
        when pg_catalog.to_regnamespace('{schema}') is null
            then pg_catalog.has_database_privilege(pg_catalog.current_database(), 'create')
        else pg_catalog.has_schema_privilege(pg_catalog.to_regnamespace('{schema}')::oid, 'create')
    end as may_create_schema,
    pg_catalog.has_database_privilege(pg_catalog.current_database(), 'temporary') as may_create_temporary,
    current_user::text as role,
    array(
        select namespace.nspname::text
        from unnest(pg_catalog.current_schemas(false)) as searched (name)
        join pg_catalog.pg_namespace as namespace on namespace.nspname = searched.name
        cross join lateral pg_catalog.aclexplode(namespace.nspacl) as granted
        where granted.grantee = 0 and granted.privilege_type = 'CREATE'
    ) as open_schemas,
    -- Not to_regclass, which fails where the role may not use the schema.
    exists (
        select from pg_catalog.pg_class as class
        where class.relnamespace = pg_catalog.to_regnamespace('{schema}') and class.relname = 'sync_migrations'
    ) as installed

-- name: examine_own_tables
-- The pipeline's own tables: the settings of each.
select class.relname as name, coalesce(class.reloptions, '{}') as options
from pg_catalog.pg_class as class
where class.relnamespace = pg_catalog.to_regnamespace('{schema}') and class.relkind = 'r'
order by class.relname

-- name: examine_own_rights
-- What this role lacks to run a consumer on the pipeline's own schema, as the statements that grant it.
select 'grant usage on schema {schema}' as lacking
where not pg_catalog.has_schema_privilege(pg_catalog.to_regnamespace('{schema}')::oid, 'usage')
union all
select pg_catalog.format(
    'grant %%s on {schema}.%%I', pg_catalog.string_agg(needed.privilege, ', ' order by needed.position), class.relname
)
from pg_catalog.pg_class as class
cross join unnest(array['select', 'insert', 'update', 'delete']) with ordinality as needed (privilege, position)
where class.relnamespace = pg_catalog.to_regnamespace('{schema}')
    and (class.relkind = 'r' and class.relname <> 'sync_migrations' or needed.privilege = 'select')
    and class.relkind in ('r', 'v')
    and not pg_catalog.has_table_privilege(class.oid, needed.privilege)
group by class.relname
union all
select 'grant execute on function ' || function.oid::regprocedure::text
from pg_catalog.pg_proc as function
where function.pronamespace = pg_catalog.to_regnamespace('{schema}')
    and function.prorettype <> 'trigger'::regtype
    and not pg_catalog.has_function_privilege(function.oid, 'execute')

-- name: examine_tables
-- For each synced table: this role's rights, and what of the table cannot be seen in `read_catalog`.
select
    class.oid::bigint as oid,
    -- Schema and name of this table and of each of its partitions whose owner this role is not.
    array(
        select array[namespace.nspname::text, member.relname::text]
        from pg_catalog.pg_class as member
        join pg_catalog.pg_namespace as namespace on namespace.oid = member.relnamespace
        where not pg_catalog.pg_has_role(member.relowner, 'usage')
            and (
                member.oid = class.oid
                or member.oid in (select relid from pg_catalog.pg_partition_tree(class.oid))
            )
        order by member.oid
    ) as of_others,
    array(
        select needed.privilege
        from unnest(array['select', 'insert', 'update', 'delete']) with ordinality as needed (privilege, position)
        where not pg_catalog.has_table_privilege(class.oid, needed.privilege)
        order by needed.position
    ) as lacking,
    class.relpersistence = 'u' as unlogged,
    array(
        select attribute.attname::text
        from pg_catalog.pg_attribute as attribute
        join pg_catalog.pg_type as type on type.oid = attribute.atttypid
        where attribute.attrelid = class.oid and attribute.attnum > 0 and not attribute.attisdropped
            and attribute.attnotnull and not attribute.atthasdef and attribute.attidentity = ''
            -- A domain can have a default of its own.
            and type.typdefault is null
        order by attribute.attnum
    ) as required_columns,
    array(
        select attribute.attname::text
        from pg_catalog.pg_attribute as attribute
        where attribute.attrelid = class.oid and attribute.attnum > 0 and not attribute.attisdropped
            and attribute.attgenerated <> ''
        order by attribute.attnum
    ) as generated_columns,
    array(
        select distinct trigger.tgname::text
        from pg_catalog.pg_trigger as trigger
        join pg_catalog.pg_proc as function on function.oid = trigger.tgfoid
        where (
                trigger.tgrelid = class.oid
                or trigger.tgrelid in (select relid from pg_catalog.pg_partition_tree(class.oid))
            )
            and not trigger.tgisinternal
            and trigger.tgenabled in ('O', 'A')
            -- Row-level and BEFORE, on INSERT or UPDATE.
            and trigger.tgtype & 3 = 3
            and trigger.tgtype & 20 <> 0
            and function.pronamespace <> coalesce(pg_catalog.to_regnamespace('{schema}')::oid, 0)
            -- One that asks whether the pipeline writes knows what to do.
            and pg_catalog.strpos(pg_catalog.pg_get_triggerdef(trigger.oid) || function.prosrc, 'sync_pipeline.applying') = 0
        order by 1
    ) as rewriting_triggers,
    array(
        select constrained.conname::text from pg_catalog.pg_constraint as constrained
        where constrained.conrelid = class.oid and constrained.condeferrable and constrained.contype in ('u', 'x')
        order by 1
    ) as deferrable_uniques
from pg_catalog.pg_class as class
where class.oid = any (%(oids)s::oid[])

-- name: examine_enums
-- The labels of every column of some tables whose type is an enum, a domain over one or an array of one.
select
    attribute.attrelid::bigint as oid,
    attribute.attname as column_name,
    array(
        select label.enumlabel::text from pg_catalog.pg_enum as label
        where label.enumtypid = enum.oid
        order by label.enumsortorder
    ) as labels
from pg_catalog.pg_attribute as attribute
join pg_catalog.pg_type as type on type.oid = attribute.atttypid
left join pg_catalog.pg_type as base on type.typtype = 'd' and base.oid = type.typbasetype
join pg_catalog.pg_type as enum
    on enum.typtype = 'e' and enum.oid in (type.oid, type.typelem, base.oid, base.typelem)
where attribute.attrelid = any (%(oids)s::oid[]) and attribute.attnum > 0 and not attribute.attisdropped

-- name: examine_foreign_keys
-- Foreign keys with a synced table at one end only.
with synced as (
    select oid, oid as root from unnest(%(oids)s::oid[]) as given (oid)
    union
    select tree.relid::oid, given.oid
    from unnest(%(oids)s::oid[]) as given (oid)
    cross join pg_catalog.pg_partition_tree(given.oid) as tree
)
select
    reference.conname as name,
    reference.confdeltype::text as on_delete,
    child.root::bigint as child_oid,
    parent.root::bigint as parent_oid,
    reference.conrelid::regclass::text as child,
    reference.confrelid::regclass::text as parent
from pg_catalog.pg_constraint as reference
left join synced as child on child.oid = reference.conrelid
left join synced as parent on parent.oid = reference.confrelid
where reference.contype = 'f'
    and reference.conparentid = 0
    and (child.oid is null) <> (parent.oid is null)
order by reference.conname

-- name: examine_following_keys
-- Foreign keys between synced tables whose children follow an update of the parent.
select
    reference.conname as name,
    reference.conrelid::bigint as child_oid,
    reference.confrelid::bigint as parent_oid,
    array(
        select attribute.attname::text from pg_catalog.pg_attribute as attribute
        where attribute.attrelid = reference.conrelid and attribute.attnum = any (reference.conkey)
    ) as columns,
    array(
        select attribute.attname::text from pg_catalog.pg_attribute as attribute
        where attribute.attrelid = reference.confrelid and attribute.attnum = any (reference.confkey)
    ) as parent_columns
from pg_catalog.pg_constraint as reference
where reference.contype = 'f'
    and reference.confupdtype = 'c'
    and reference.conrelid = any (%(oids)s::oid[])
    and reference.confrelid = any (%(oids)s::oid[])
order by reference.conname

-- name: read_sequences
-- The sequences that give columns of some tables their values: owned, of an identity, or named in a default.
with used as (
    select refobjid as relation, refobjsubid as attnum, objid as sequence
    from pg_catalog.pg_depend
    where classid = 'pg_catalog.pg_class'::regclass
        and refclassid = 'pg_catalog.pg_class'::regclass
        and deptype in ('a', 'i')
        and refobjid = any (%(oids)s::oid[])
    union
    select attrdef.adrelid, attrdef.adnum, depend.refobjid
    from pg_catalog.pg_attrdef as attrdef
    join pg_catalog.pg_depend as depend
        on depend.classid = 'pg_catalog.pg_attrdef'::regclass
        and depend.objid = attrdef.oid
        and depend.refclassid = 'pg_catalog.pg_class'::regclass
    where attrdef.adrelid = any (%(oids)s::oid[])
)
select
    used.relation::bigint as oid,
    attribute.attname as column_name,
    namespace.nspname as schema_name,
    class.relname as sequence_name,
    sequence.seqincrement as increment,
    sequence.seqmin as least,
    sequence.seqmax as greatest,
    pg_catalog.has_sequence_privilege(class.oid, 'select') as readable,
    -- Whether the column has the sequence's own values, none that its default computes from them.
    type.typcategory = 'N' and coalesce(
        pg_catalog.pg_get_expr(attrdef.adbin, attrdef.adrelid) ~ '^\(?nextval\(''[^'']*''::regclass\)\)?(::[a-z ]+)?$',
        true
    ) as direct
from used
join pg_catalog.pg_sequence as sequence on sequence.seqrelid = used.sequence
join pg_catalog.pg_class as class on class.oid = used.sequence
join pg_catalog.pg_namespace as namespace on namespace.oid = class.relnamespace
join pg_catalog.pg_attribute as attribute
    on attribute.attrelid = used.relation and attribute.attnum = used.attnum
join pg_catalog.pg_type as type on type.oid = attribute.atttypid
left join pg_catalog.pg_attrdef as attrdef
    on attrdef.adrelid = attribute.attrelid and attrdef.adnum = attribute.attnum
order by used.relation, attribute.attnum

-- name: examine_vacuum
-- Who keeps vacuum from removing acknowledged events: what it is, how it is called, since how many seconds.
select 'session' as kind, activity.pid::text as name,
    coalesce(nullif(activity.application_name, ''), activity.usename::text, 'unknown') as owner,
    extract(epoch from pg_catalog.clock_timestamp() - activity.xact_start)::double precision as seconds
from pg_catalog.pg_stat_activity as activity
where (activity.backend_xmin is not null or activity.backend_xid is not null)
    and activity.xact_start < pg_catalog.clock_timestamp() - pg_catalog.make_interval(secs => %(seconds)s)
    and activity.pid <> pg_catalog.pg_backend_pid()
    and activity.backend_type = 'client backend'
    and activity.datname = pg_catalog.current_database()
union all
select 'prepared transaction', prepared.gid, prepared.owner::text,
    extract(epoch from pg_catalog.clock_timestamp() - prepared.prepared)::double precision
from pg_catalog.pg_prepared_xacts as prepared
where prepared.prepared < pg_catalog.clock_timestamp() - pg_catalog.make_interval(secs => %(seconds)s)
    and prepared.database = pg_catalog.current_database()
union all
select 'replication slot', slot.slot_name::text, slot.slot_type, null
from pg_catalog.pg_replication_slots as slot
where slot.xmin is not null and (not slot.active or pg_catalog.age(slot.xmin) > %(transactions)s)

-- name: read_glance
-- What a sensor asks before it starts a run: does anything wait that can be applied, and since when is the node paused.
select
    exists (select from {schema}.sync_events)
    -- The least comes from the index: failures that are not due are not read, however many there are.
    or coalesce((select min(next_attempt_at) from {schema}.sync_failures) <= pg_catalog.clock_timestamp(), false)
        as waiting,
    (select paused_at from {schema}.sync_node) as paused_at

-- name: has_waiting_beside
-- True when anything waits that could be applied and is of none of these tables.
select
    exists (select from {schema}.sync_events where table_name <> all (%(tables)s::text[]))
    or exists (
        select from {schema}.sync_failures
        where next_attempt_at <= pg_catalog.clock_timestamp() and table_name <> all (%(tables)s::text[])
    )

-- name: read_lag
-- The age in seconds of the oldest event that waits, 0 when none does.
select coalesce(extract(epoch from pg_catalog.clock_timestamp() - min(created_at)), 0)::double precision
from {schema}.sync_events

-- name: read_table_status
-- For each table of which anything waits or failed: events, the age of the oldest in seconds, failures by state.
with events as (
    select table_name, count(*) as pending, min(created_at) as oldest_at
    from {schema}.sync_events
    group by table_name
),
failures as (
    select
        table_name,
        count(*) filter (where state = 'retrying') as retrying,
        count(*) filter (where state = 'dead') as dead,
        count(*) filter (where state = 'held') as held
    from {schema}.sync_failures
    group by table_name
)
select
    table_name,
    coalesce(events.pending, 0) as pending,
    coalesce(extract(epoch from pg_catalog.clock_timestamp() - events.oldest_at), 0)::double precision
        as oldest_seconds,
    coalesce(failures.retrying, 0) as retrying,
    coalesce(failures.dead, 0) as dead,
    coalesce(failures.held, 0) as held
from events
full join failures using (table_name)

-- name: waiting_records
-- The records of one table ({table}) that wait here: changed and not yet synced, refused, or held by a conflict.
select record_id from {schema}.sync_events where table_name = {table}
union
select record_id from {schema}.sync_failures where table_name = {table}
union
select record_id from {schema}.sync_conflicts where table_name = {table} and resolved_at is null

-- name: read_hashing
-- What decides whether both servers hash a text alike: its bytes, and the hash function itself.
select
    pg_catalog.current_setting('server_encoding') as encoding,
    pg_catalog.hashtextextended('sync-pipeline' collate "C", 1) as probe
