-- How a run's command ended, as a number. (Functions are replaced by those of ../code; one whose
-- parameters change has to go first, or there would be two of it.)

alter table public.runs add column exit_code integer;
drop function if exists public.finish_run(bigint, integer, text, text);
drop function if exists openweights.end_run(public.runs, text, text, text);
