-- A question that a person waits for is taken first, but not for ever. What claims a job is told
-- whether it may be one (code/040_workers.sql).
drop function if exists openweights.next_job(public.workers, uuid[], text[]);
