-- How a run's command ended, as a number. (Functions are replaced by those of ../code; one whose
-- parameters change has to go first, or there would be two of it.)

alter table public.runs add column exit_code integer;
alter table public.runs add column event_bytes bigint not null default 0;
-- Where its content lies below the organization's folder; null for files of before, whose content
-- lies under their id.
alter table public.files add column object text;
drop function if exists public.finish_run(bigint, integer, text, text);
drop function if exists openweights.end_run(public.runs, text, text, text);
drop function if exists openweights.sync_job(public.jobs, public.jobs);

-- What the manager of an organization has to know after a restart, such as which image keeps failing.
alter table public.organizations add column manager_state jsonb not null default '{}';
