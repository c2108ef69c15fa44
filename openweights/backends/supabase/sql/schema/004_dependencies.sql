-- Jobs that wait for others: ids that must complete first, and the one whose end has failed a job.
alter table public.jobs add column after text[];
alter table public.jobs add column failed_by text;
create index jobs_dependent on public.jobs (organization_id, status) where after is not null;

create or replace function openweights.check_transition() returns trigger language plpgsql as $$
begin
    if new.status = old.status
        or (old.status = 'pending' and new.status in ('in_progress', 'canceled'))
        or (old.status = 'pending' and new.status = 'failed' and new.failed_by is not null)
        or (old.status = 'in_progress' and new.status <> 'in_progress')
        or (old.status in ('failed', 'canceled') and new.status = 'pending')
    then
        return new;
    end if;
    raise exception 'the life cycle of a job forbids the change from % to %', old.status, new.status
        using errcode = 'check_violation';
end $$;
