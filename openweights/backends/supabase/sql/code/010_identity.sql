-- Who asks. A request carries its key in the header `x-ow-key`, which PostgREST and the storage
-- service put into the setting `request.headers`; the database knows only the key's SHA-256.
--
-- Two ways to use it: policies take the functions that answer (null for nobody), and every RPC
-- begins with `openweights.caller`, which raises. What clients call runs as its owner (`security
-- definer`), because the roles that clients come in with may write nothing; what only that calls
-- does so anyhow, and is spared the change of settings.
--
-- A check is a function that raises or answers true, for `declare` or `if`: there it is a mere
-- expression, whereas `perform` makes a statement of it, which costs more than the check.

-- What clients see as an error: PostgREST makes HTTP nnn of PTnnn, and passes the detail on.
create or replace function openweights.refuse(p_class text, p_message text) returns void
language plpgsql as $$
begin
    raise exception using
        errcode = case p_class
            when 'invalid_input' then 'PT400'
            when 'unauthenticated' then 'PT401'
            when 'budget' then 'PT402'
            when 'forbidden' then 'PT403'
            when 'not_found' then 'PT404'
            else 'PT409'  -- invalid_state, fenced
        end,
        message = p_message,
        detail = p_class;
end $$;

create or replace function openweights.hash(p_key text) returns text
language sql stable as $$
    select encode(sha256(convert_to(p_key, 'UTF8')), 'hex')
$$;

create or replace function openweights.sent_key() returns text
language sql stable as $$
    select nullif(nullif(current_setting('request.headers', true), '')::json ->> 'x-ow-key', '')
$$;

-- The live key of this request; null when there is none.
create or replace function openweights.current_key() returns public.api_keys
language sql stable security definer set search_path = openweights, public, pg_temp as $$
    select k
    from api_keys k join members m on m.id = k.member_id
    where k.key_hash = hash(sent_key())
        and k.revoked_at is null
        and (k.expires_at is null or k.expires_at > now())
        and m.removed_at is null
$$;

-- Raises, and says why this is no live key.
create or replace function openweights.refuse_key(p_sent text) returns void
language plpgsql as $$
declare
    k public.api_keys;
    trouble text;
begin
    select * into k from public.api_keys where key_hash = openweights.hash(p_sent);
    if p_sent is null then
        trouble := 'no key was sent: log in with `ow login`, or set OPENWEIGHTS_API_KEY';
    elsif not found then
        trouble := 'this project does not know the key: check that key and URL belong together';
    elsif k.revoked_at is not null then
        trouble := format('the key %s… has been revoked: ask an admin for a new one', k.prefix);
    elsif k.expires_at <= now() then
        trouble := format('the key %s… has expired: ask an admin for a new one', k.prefix);
    else
        trouble := format('whom the key %s… belongs to has left the organization', k.prefix);
    end if;
    perform openweights.refuse('unauthenticated', trouble);
end $$;

-- The live key of this request; raises when there is none.
create or replace function openweights.known_key() returns public.api_keys
language plpgsql stable as $$
declare
    me public.api_keys;
    sent text := openweights.sent_key();
begin
    select k.* into me
    from public.api_keys k join public.members m on m.id = k.member_id
    where k.key_hash = openweights.hash(sent)
        and k.revoked_at is null
        and (k.expires_at is null or k.expires_at > now())
        and m.removed_at is null;
    if not found then
        perform openweights.refuse_key(sent);
    end if;
    return me;
end $$;

-- The key of this request, if it is alive and has one of these roles; raises otherwise.
create or replace function openweights.caller(variadic p_roles text[]) returns public.api_keys
language plpgsql as $$
declare
    me public.api_keys := openweights.known_key();
begin
    if not me.role = any (p_roles) then
        perform openweights.refuse('forbidden', format(
            'a key of role %s may not do this; it takes the role %s',
            me.role, array_to_string(p_roles, ' or ')));
    end if;
    -- Once a minute is enough, and nobody waits for it: many workers may share one key.
    if me.last_used_at is null or me.last_used_at < now() - interval '1 minute' then
        update public.api_keys set last_used_at = now()
        where id = (
            select id from public.api_keys where id = me.id for no key update skip locked
        );
    end if;
    return me;
end $$;

-- ---- what policies ask; once per statement, as `(select openweights.…())`

-- For our tables: without a live key it raises, because to a person whose key was revoked, no rows
-- would look like no jobs.
create or replace function openweights.organization() returns uuid
language sql stable security definer set search_path = openweights, public, pg_temp as $$
    select (known_key()).organization_id
$$;

-- For stored objects, which others may have, too: without a live key it is null.
create or replace function openweights.organization_or_null() returns text
language sql stable security definer set search_path = openweights, public, pg_temp as $$
    select (current_key()).organization_id::text
$$;

-- Whether the key is a person's, who may see everything of the organization.
create or replace function openweights.is_person() returns boolean
language sql stable security definer set search_path = openweights, public, pg_temp as $$
    select coalesce((current_key()).role in ('admin', 'member'), false)
$$;

create or replace function openweights.worker() returns text
language sql stable security definer set search_path = openweights, public, pg_temp as $$
    select (current_key()).worker_id
$$;

-- The jobs that a job builds on: those of its `after`, and fine-tuning jobs that it names as models.
create or replace function openweights.named_jobs(j public.jobs) returns setof text
language sql stable as $$
    select unnest(j.after)
    union
    select m[1] from regexp_matches(j.params::text,
        '"(s?ftjob-[0-9a-f]{12}(?:-[A-Za-z0-9._-]+)?)(?:/checkpoint-[0-9]+)?"', 'g') m
$$;

-- What the worker of this key holds now, as (organization, job).
create or replace function openweights.worker_holds()
returns table (organization_id uuid, job_id text)
language sql stable security definer set search_path = openweights, public, pg_temp as $$
    select r.organization_id, r.job_id
    from current_key() me
        join runs r on r.organization_id = me.organization_id
            and r.worker_id = me.worker_id and r.status = 'in_progress'
    where me.role = 'worker'
$$;

-- Jobs that the worker of this key holds or has held, and those that what it holds builds on.
create or replace function openweights.worker_jobs() returns text[]
language sql stable security definer set search_path = openweights, public, pg_temp as $$
    select coalesce(array_agg(id), '{}')
    from (
        select r.job_id as id
        from current_key() me
            join runs r on r.organization_id = me.organization_id and r.worker_id = me.worker_id
        where me.role = 'worker'
        union
        select named
        from worker_holds() h
            join jobs j on j.organization_id = h.organization_id and j.id = h.job_id
            cross join named_jobs(j) named
    ) as readable
$$;

-- Files that a worker's key may read: those of the job that it holds now, what the jobs that this one
-- builds on have made, and those that it put.
create or replace function openweights.worker_files() returns text[]
language sql stable security definer set search_path = openweights, public, pg_temp as $$
    with me as (select k.* from current_key() k where k.role = 'worker')
    select coalesce(array_agg(file_id), '{}')
    from (
        select f.file_id
        from worker_holds() h
            join job_files f on f.organization_id = h.organization_id and f.job_id = h.job_id
        union
        select f.file_id
        from worker_holds() h
            join jobs j on j.organization_id = h.organization_id and j.id = h.job_id
            cross join named_jobs(j) named
            join job_files f on f.organization_id = h.organization_id and f.job_id = named
        where f.file_id ~ '^(result|checkpoint|event):'
        union
        select f.file_id
        from me join file_keys f on f.organization_id = me.organization_id and f.key_id = me.id
    ) as readable
$$;

create or replace function openweights.key_id() returns text
language sql stable security definer set search_path = openweights, public, pg_temp as $$
    select (current_key()).id::text
$$;

-- Whether a record says that its content is the object of this name, `<organization>/<key>/<file>`,
-- or of before `<organization>/<file>`.
create or replace function openweights.has_record(p_name text) returns boolean
language sql stable security definer set search_path = openweights, public, pg_temp as $$
    select exists (
        select from files
        where organization_id = split_part(p_name, '/', 1)::uuid
            and id = regexp_replace(p_name, '^.*/', '')
            and coalesce(object, id) = substring(p_name from position('/' in p_name) + 1)
    )
$$;

-- Whether an object is where this key may put it: its own folder, or for people the place of before.
create or replace function openweights.is_own_place(p_name text) returns boolean
language sql stable security definer set search_path = openweights, public, pg_temp as $$
    select split_part(p_name, '/', 1) = k.organization_id::text
        and (p_name ~ ('^[^/]+/' || k.id || '/[A-Za-z0-9_-]+:file-[0-9a-f]{12}$')
            or (k.role <> 'worker' and p_name ~ '^[^/]+/[A-Za-z0-9_-]+:file-[0-9a-f]{12}$'))
    from current_key() k
$$;

-- ---- what a worker's key may report on

-- Raises unless the key may act as this worker: an admin's may act as any.
create or replace function openweights.check_worker(me public.api_keys, p_worker_id text)
returns boolean language plpgsql stable as $$
begin
    if me.role = 'worker' and me.worker_id is distinct from p_worker_id then
        perform openweights.refuse('forbidden', format(
            'this key belongs to %s, not to worker %s',
            coalesce('worker ' || me.worker_id, 'a worker that has not registered'), p_worker_id));
    end if;
    return true;
end $$;

-- Raises unless the key may report on the run: a worker's key on those of its worker, a member's on
-- those of scripts, which run outside any worker.
create or replace function openweights.check_reporter(me public.api_keys, r public.runs)
returns boolean language plpgsql stable as $$
begin
    if (me.role = 'worker' and me.worker_id is distinct from r.worker_id)
        or (me.role = 'member' and r.worker_id is not null)
        or (me.role = 'worker' and r.worker_id is null)
    then
        perform openweights.refuse('forbidden', format(
            'run %s belongs to %s: this key may not report on it',
            r.id, coalesce('worker ' || r.worker_id, 'a script')));
    end if;
    return true;
end $$;
