-- When a job may run, for how long, and how often it is tried.
alter table public.jobs add column not_before timestamptz;
alter table public.jobs add column label text;
alter table public.jobs add column max_running integer;  -- of the jobs with its label
alter table public.jobs add column max_duration_s double precision;
alter table public.jobs add column stall_timeout_s double precision;
alter table public.jobs add column retry jsonb;
alter table public.jobs add column retries integer not null default 0;  -- of those that `retry` allows
create index jobs_labeled on public.jobs (organization_id, label) where status = 'in_progress';

alter table public.runs add column cause text;
-- The last sign of life of the job itself: how much it had reported when that was looked at, and when
-- that was first seen.
alter table public.runs add column heard_bytes bigint not null default 0;
alter table public.runs add column quiet_since timestamptz;

alter table public.organizations add column paused_at timestamptz;
alter table public.organizations add column max_duration_s double precision;

drop function if exists public.finish_run(bigint, integer, text, text, integer);
drop function if exists public.release_run(bigint, integer, text);
drop function if exists openweights.end_run(public.runs, text, text, text, integer);
drop function if exists openweights.lose_run(public.jobs, public.runs, text);
drop function if exists openweights.next_job(public.workers, uuid[]);
