-- The dearest pod that a job may run on.
alter table public.jobs add column max_usd_per_hour numeric;
