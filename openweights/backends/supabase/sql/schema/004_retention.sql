-- When a file was put last: one that nothing names may go when that is long ago. How much of a log is
-- kept, and for how many days what nobody needs (null: until somebody removes it).
alter table public.files add column used_at timestamptz not null default now();
alter table public.organizations
    add column log_limit_mb integer not null default 64 check (log_limit_mb between 1 and 1024),
    add column keep_days double precision check (keep_days >= 1);
