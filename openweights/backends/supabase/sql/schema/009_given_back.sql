-- A run that its worker has ended in good order is no failure: what the end of a text said before.
alter table public.runs add column is_given_back boolean not null default false;
update public.runs set is_given_back = true
where status = 'failed' and ended_by = 'release' and error like '%, not counted';

-- What claims a job is told how many of each label run.
drop function if exists openweights.next_job(public.workers, uuid[], text[], boolean);
drop function if exists openweights.are_completed(uuid, text[]);
