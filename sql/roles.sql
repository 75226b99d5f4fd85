-- Roles that have no more rights than they need, for one link. Run this with psql in each of its two databases, as a
-- superuser, or as a role that may create roles and owns the tables; running it again is harmless.
--
--   psql "$ADMIN_DSN" -v owner=shop_owner -v application=shop -v consumer=sync_consumer \
--       -v schemas='public' -v tables='accounts, users, orders' -f roles.sql
--
-- owner         owns the synced tables and the pipeline's schema; `install` and `uninstall` run as this role
-- application   reads and writes the tables; has no right on the pipeline's schema and needs none
-- consumer      `stream`, `sync` and every other command, and Dagster, run as this role
-- schemas       the schemas of the tables
-- tables        the synced tables, by the names of this database
-- schema        the pipeline's schema, `sync` if it is left out
--
-- No password is set here: \password in psql sets one without sending it in clear.
\set ON_ERROR_STOP on
\if :{?schema}
\else
    \set schema sync
\endif

begin;

select pg_catalog.format('create role %I login', name)
from unnest(array[:'owner', :'application', :'consumer']) as given (name)
where not exists (select from pg_catalog.pg_roles where rolname = name)
\gexec

-- The owner, of partitions too: each has triggers of its own.
create schema if not exists :"schema" authorization :"owner";
select pg_catalog.format('alter table %s owner to %I', class.oid::regclass, :'owner')
from unnest(pg_catalog.string_to_array(:'tables', ',')) as given (name)
join pg_catalog.pg_class as class
    on class.oid = pg_catalog.btrim(name)::regclass
    or class.oid in (select relid from pg_catalog.pg_partition_tree(pg_catalog.btrim(name)::regclass))
where pg_catalog.pg_get_userbyid(class.relowner) <> :'owner'
\gexec

-- Nobody else creates what a role finds by its search path.
revoke create on schema :schemas from public;
revoke all on schema :"schema" from public;
grant usage on schema :schemas to :"owner", :"application", :"consumer";

-- The application. Capture runs with the rights of the owner, so it needs no more than it needs without the pipeline.
grant select, insert, update, delete on :tables to :"application";
select pg_catalog.format('grant usage on sequence %s to %I', depend.objid::regclass, :'application')
from unnest(pg_catalog.string_to_array(:'tables', ',')) as given (name)
join pg_catalog.pg_depend as depend
    on depend.refclassid = 'pg_catalog.pg_class'::regclass
    and depend.refobjid = pg_catalog.btrim(name)::regclass
    and depend.classid = 'pg_catalog.pg_class'::regclass
    and depend.deptype = 'a'
join pg_catalog.pg_class as class on class.oid = depend.objid and class.relkind = 'S'
\gexec

-- The consumer: the rows of the synced tables, temporary tables to stage them in, and what `install` creates as the
-- owner in the pipeline's schema, now and later. No sequence: every value is sent.
select pg_catalog.format('grant connect, temporary on database %I to %I', pg_catalog.current_database(), :'consumer')
\gexec
grant select, insert, update, delete on :tables to :"consumer";
grant usage on schema :"schema" to :"consumer";
grant select, insert, update, delete on all tables in schema :"schema" to :"consumer";
grant execute on all functions in schema :"schema" to :"consumer";
alter default privileges for role :"owner" in schema :"schema"
    grant select, insert, update, delete on tables to :"consumer";
alter default privileges for role :"owner" in schema :"schema"
    grant execute on functions to :"consumer";

commit;
