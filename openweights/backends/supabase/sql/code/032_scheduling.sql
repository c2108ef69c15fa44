-- When a pending job may be taken, and what becomes of it when that can never be.
--
-- A job waits until all jobs of its `after` have completed, which they stay. When one of them fails or
-- is canceled, it fails, and so do those that wait for it; `failed_by` remembers why, so that they come
-- back when that one is queued again. The words are those of openweights/backends/scheduling.py.

-- In PL/pgSQL, so that a claim, which seldom needs it, does not take it in and prepare for it.
create or replace function openweights.are_completed(p_organization uuid, p_ids text[])
returns boolean language plpgsql stable as $$
begin
    return not exists (
        select from public.jobs
        where organization_id = p_organization and id = any (p_ids) and status <> 'completed'
    );
end $$;

-- Until the transaction ends none of these jobs ends: one that ended now would not see who is just
-- about to wait for it. Taken before the lock on the job that waits, as their ends take them.
create or replace function openweights.hold_after(p_organization uuid, p_after text[]) returns void
language plpgsql as $$
begin
    if p_after is not null then
        perform from public.jobs where organization_id = p_organization and id = any (p_after)
        order by id for share;
    end if;
end $$;

-- The ids from a job back to itself, if it waited for these; null without a cycle.
create or replace function openweights.cycle_through(p_organization uuid, p_id text, p_after text[])
returns text[] language plpgsql stable as $$
declare
    came_from jsonb := coalesce((select jsonb_object_agg(needed, p_id) from unnest(p_after) needed), '{}');
    waiting text[] := array(select jsonb_object_keys(came_from));
    needed text;
    path text[] := array[p_id];
begin
    while cardinality(waiting) > 0 loop
        if waiting[1] = p_id then
            loop
                path := (came_from ->> path[1]) || path;
                exit when path[1] = p_id;
            end loop;
            return path;
        end if;
        for needed in
            select unnest(after) from public.jobs where organization_id = p_organization and id = waiting[1]
        loop
            if not came_from ? needed then
                came_from := came_from || jsonb_build_object(needed, waiting[1]);
                waiting := waiting || needed;
            end if;
        end loop;
        waiting := waiting[2:];
    end loop;
    return null;
end $$;

-- Raises unless the job can wait for these, which are held.
create or replace function openweights.check_after(p_organization uuid, p_id text, p_after text[])
returns boolean language plpgsql as $$
declare
    unknown text;
    ended public.jobs;
    path text[];
begin
    select needed into unknown
    from unnest(p_after) needed
    where needed <> p_id and not exists (
        select from public.jobs where organization_id = p_organization and id = needed
    );
    if found then
        perform openweights.refuse('invalid_input', format(
            'after: there is no job %L; correct the id', unknown));
    end if;
    path := openweights.cycle_through(p_organization, p_id, p_after);
    if path is not null then
        perform openweights.refuse('invalid_input', format(
            'after: these jobs would wait for one another: %s', array_to_string(path, ' waits for ')));
    end if;
    ended := openweights.ended_badly(p_organization, p_after);
    if ended.id is not null then
        perform openweights.refuse('invalid_state', format(
            'after: job %s is %s: restart it first, with `ow restart %s`',
            ended.id, ended.status, ended.id));
    end if;
    return true;
end $$;

-- The first of these jobs that has failed or was canceled.
create or replace function openweights.ended_badly(p_organization uuid, p_ids text[])
returns public.jobs language plpgsql stable as $$
declare
    j public.jobs;
begin
    select * into j from public.jobs
    where organization_id = p_organization and id = any (p_ids) and status in ('failed', 'canceled')
    order by array_position(p_ids, id::text) limit 1;
    return j;
end $$;

create or replace function openweights.reason_of_dependent(p_job_id text, p_status text)
returns text language sql immutable as $$
    select format('it was to come after job %s, which %s; it is restarted with that one', p_job_id,
        case p_status when 'canceled' then 'was canceled' else 'has failed' end)
$$;

-- A job has ended with this status, failed or canceled: fail what waits for it, and so on.
create or replace function openweights.fail_dependents(
    p_organization uuid, p_job_id text, p_status text
) returns void language plpgsql as $$
declare
    ended text[] := array[p_job_id];
    how text := p_status;
    dependent text;
begin
    while cardinality(ended) > 0 loop
        for dependent in
            select id from public.jobs
            where organization_id = p_organization and status = 'pending' and after is not null
                and ended[1] = any (after)
            order by id
        loop
            update public.jobs
            set status = 'failed', failed_by = ended[1], updated_at = now(),
                outputs = jsonb_build_object('error', openweights.reason_of_dependent(ended[1], how))
            where organization_id = p_organization and id = dependent and status = 'pending';
            if found then
                ended := ended || dependent;
            end if;
        end loop;
        ended := ended[2:];
        how := 'failed';
    end loop;
end $$;

-- A failed or canceled job is pending again: so is what had failed because of it, and so on.
create or replace function openweights.revive_dependents(p_organization uuid, p_job_id text)
returns void language plpgsql as $$
declare
    revived text[] := array[p_job_id];
    j public.jobs;
    ended public.jobs;
begin
    while cardinality(revived) > 0 loop
        for j in
            select * from public.jobs
            where organization_id = p_organization and status = 'failed' and after is not null
                and failed_by = revived[1]
            order by id for no key update
        loop
            ended := openweights.ended_badly(p_organization, j.after);
            if ended.id is null then
                j := openweights.requeue_job(j, 0);
                revived := revived || j.id::text;
            else
                update public.jobs
                set failed_by = ended.id, updated_at = now(), outputs = jsonb_build_object(
                    'error', openweights.reason_of_dependent(ended.id, ended.status))
                where organization_id = j.organization_id and id = j.id;
            end if;
        end loop;
        revived := revived[2:];
    end loop;
end $$;
