-- Events of one type, such as a job's checkpoints, found without reading its history. Metrics have
-- no type, so this stays small however long a run is.
create index events_of_type on public.events (organization_id, job_id, (data ->> 'type'), id)
    where data ->> 'type' is not null;
