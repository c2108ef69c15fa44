-- What a database holds of ours, one line each: kind, name, definition. What `ow db init` left is
-- kept in `openweights.installed`, and `ow db check` compares it with what is there now.
with ours as (
    select c.oid, c.relname, n.nspname || '.' || c.relname as name, c.relrowsecurity
    from pg_class c join pg_namespace n on n.oid = c.relnamespace
    where c.relkind = 'r' and (
        n.nspname = 'openweights'
        or n.nspname = 'public' and c.relname = any (array['organizations', 'members', 'api_keys',
            'secrets', 'files', 'file_keys', 'workers', 'jobs', 'job_files', 'runs', 'events',
            'run_values', 'log_chunks'])
        or n.nspname = 'storage' and c.relname = 'objects')
), functions as (
    select p.oid, p.oid::regprocedure::text as name, p.proacl, p.proowner
    from pg_proc p
    where p.pronamespace = 'openweights'::regnamespace
        -- What asks who calls is one of ours.
        or (p.pronamespace = 'public'::regnamespace and p.prosrc like '%openweights.caller(%')
), grants as (
    select 'table ' || o.name as what, a.grantee, a.privilege_type
    from ours o join pg_class c on c.oid = o.oid, aclexplode(c.relacl) a
    where o.name <> 'storage.objects'
    union all
    select 'column ' || o.name || '.' || t.attname, a.grantee, a.privilege_type
    from ours o join pg_attribute t on t.attrelid = o.oid, aclexplode(t.attacl) a
    where o.name <> 'storage.objects'
    union all
    select 'function ' || f.name, a.grantee, a.privilege_type
    from functions f, aclexplode(coalesce(f.proacl, acldefault('f', f.proowner))) a
    union all
    select 'schema openweights', a.grantee, a.privilege_type
    from pg_namespace n, aclexplode(n.nspacl) a
    where n.nspname = 'openweights'
)
select 'table' as kind, name,
    case when relrowsecurity then 'row-level security' else 'no row-level security' end
from ours
union all
select 'column', o.name || '.' || t.attname, concat_ws(' ', format_type(t.atttypid, t.atttypmod),
    case when t.attnotnull then 'not null' end, nullif('identity ' || t.attidentity::text, 'identity '),
    'default ' || pg_get_expr(d.adbin, d.adrelid))
from ours o
    join pg_attribute t on t.attrelid = o.oid and t.attnum > 0 and not t.attisdropped
    left join pg_attrdef d on d.adrelid = o.oid and d.adnum = t.attnum
where o.name <> 'storage.objects'
union all
select 'constraint', o.name || '.' || c.conname, pg_get_constraintdef(c.oid)
from ours o join pg_constraint c on c.conrelid = o.oid
-- PostgreSQL 18 lists what the column says already
where o.name <> 'storage.objects' and c.contype <> 'n'
union all
select 'domain', t.typnamespace::regnamespace || '.' || t.typname, concat_ws(' ',
    format_type(t.typbasetype, t.typtypmod), pg_get_constraintdef(c.oid))
from pg_type t left join pg_constraint c on c.contypid = t.oid
where t.typtype = 'd' and t.typnamespace = 'openweights'::regnamespace
union all
select 'index', i.indexrelid::regclass::text, pg_get_indexdef(i.indexrelid)
from ours o join pg_index i on i.indrelid = o.oid
where o.name <> 'storage.objects'
union all
select 'trigger', o.name || '.' || t.tgname, pg_get_triggerdef(t.oid)
from ours o join pg_trigger t on t.tgrelid = o.oid
where o.name <> 'storage.objects' and not t.tgisinternal
union all
select 'function', name, pg_get_functiondef(oid) from functions
union all
select 'policy', o.name || '.' || p.polname, concat_ws(' ', p.polcmd::text, p.polpermissive,
    (select string_agg(case when r = 0 then 'public' else r::regrole::text end, ',')
        from unnest(p.polroles) r),
    pg_get_expr(p.polqual, p.polrelid), pg_get_expr(p.polwithcheck, p.polrelid))
from ours o join pg_policy p on p.polrelid = o.oid
-- Others may have policies for buckets of theirs, but not for every bucket.
where o.name <> 'storage.objects' or p.polname like 'openweights%'
    or concat(pg_get_expr(p.polqual, p.polrelid), pg_get_expr(p.polwithcheck, p.polrelid))
        !~ 'bucket_id'
union all
select 'grant', 'to ' || case when grantee = 0 then 'public' else grantee::regrole::text end
    || ' on ' || what, string_agg(privilege_type, ', ' order by privilege_type)
from grants
where grantee = 0 or grantee::regrole::text in ('anon', 'authenticated')
group by what, grantee
union all
select 'bucket', id, case when public then 'public' else 'private' end
from storage.buckets where id = 'files'
