-- What may be stored: nothing that a client cannot read, and nothing without an end. One row that
-- every reader fails at would stop them all.
--
-- Checks are functions that raise or answer true (see 010_identity.sql). The limits are those of
-- openweights/backends/values.py.

create or replace function openweights.check_moment(p_moment timestamptz, p_what text)
returns boolean language plpgsql immutable as $$
begin
    if p_moment < '2000-01-01' or p_moment >= '2200-01-01' then
        perform openweights.refuse('invalid_input', format(
            '%s: %s is no moment of the years 2000 to 2199', p_what, p_moment));
    end if;
    return true;
end $$;

create or replace function openweights.check_number(
    p_number numeric, p_least numeric, p_most numeric, p_what text
) returns boolean language plpgsql immutable as $$
begin
    -- NaN is greater than every number.
    if p_number < p_least or p_number > p_most then
        perform openweights.refuse('invalid_input', format(
            '%s: %s is not between %s and %s', p_what, p_number, p_least, p_most));
    end if;
    return true;
end $$;

create or replace function openweights.check_text(p_text text, p_most integer, p_what text)
returns boolean language plpgsql immutable as $$
begin
    if octet_length(p_text) > p_most then
        perform openweights.refuse('invalid_input', format(
            '%s has %s bytes: at most %s can be stored', p_what, octet_length(p_text), p_most));
    end if;
    return true;
end $$;

-- A text of one line that can be shown as it is: no control characters, and none that turn the
-- direction of writing.
create or replace function openweights.check_name(p_text text, p_most integer, p_what text)
returns boolean language plpgsql immutable as $$
begin
    if p_text ~ E'[[:cntrl:]\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]' then
        perform openweights.refuse('invalid_input', format('%s: %L holds characters that cannot be shown',
            p_what, left(p_text, 60)));
    end if;
    return openweights.check_text(p_text, p_most, p_what);
end $$;

-- The params of a job, as far as others than the job itself read them.
create or replace function openweights.check_params(p_params jsonb) returns boolean
language plpgsql immutable as $$
begin
    if jsonb_typeof(p_params) is distinct from 'object' then
        perform openweights.refuse('invalid_input', 'params must be an object');
    elsif jsonb_path_exists(p_params, '$.mounted_files ? (@.type() != "object")', silent => true)
        or jsonb_path_exists(p_params, 'strict $.mounted_files.* ? (@.type() != "string")', silent => true)
    then
        perform openweights.refuse('invalid_input', 'params.mounted_files must be an object of file ids');
    elsif jsonb_typeof(p_params -> 'secrets') not in ('array', 'null')
        or jsonb_path_exists(p_params, 'strict $.secrets[*] ? (@.type() != "string")', silent => true)
    then
        perform openweights.refuse('invalid_input', 'params.secrets must be a list of names');
    elsif jsonb_typeof(p_params -> 'validated_params') not in ('object', 'null') then
        perform openweights.refuse('invalid_input', 'params.validated_params must be an object');
    elsif p_params -> 'cloud_type' not in ('"SECURE"', '"COMMUNITY"', '"ALL"', 'null') then
        perform openweights.refuse('invalid_input', 'params.cloud_type must be SECURE, COMMUNITY or ALL');
    end if;
    return openweights.check_text(p_params::text, 4194304, 'params');
end $$;

-- `{"max": …, "backoff_s": …, "on": [causes]}`
create or replace function openweights.check_retry(p_retry jsonb) returns boolean
language plpgsql immutable as $$
begin
    if p_retry is null then
        return true;
    elsif jsonb_typeof(p_retry) <> 'object' or jsonb_typeof(p_retry -> 'max') is distinct from 'number'
        or jsonb_typeof(p_retry -> 'backoff_s') is distinct from 'number'
        or jsonb_typeof(p_retry -> 'on') is distinct from 'array'
        or jsonb_path_exists(p_retry, '$.on[*] ? (@.type() != "string"
            || !(@ like_regex "^(any|oom|hub|exit:[1-9][0-9]{0,2})$"))')
    then
        perform openweights.refuse('invalid_input',
            'retry must be {max, backoff_s, on: a list of any, oom, hub, exit:N}');
    end if;
    return openweights.check_number((p_retry -> 'max')::numeric, 0, 1000, 'retry.max')
        and openweights.check_number((p_retry -> 'backoff_s')::numeric, 0, 86400, 'retry.backoff_s');
end $$;

create or replace function openweights.check_spec(s public.jobs) returns boolean
language plpgsql immutable as $$
begin
    if s.id ~ '^[-.]' then
        perform openweights.refuse('invalid_input', format('%L cannot be the id of a job', s.id));
    elsif array_ndims(s.allowed_hardware) > 1 or array_position(s.allowed_hardware, null) is not null then
        perform openweights.refuse('invalid_input', 'allowed_hardware must be a list of texts');
    elsif array_ndims(s.after) > 1 or array_position(s.after, null) is not null then
        perform openweights.refuse('invalid_input', 'after must be a list of ids of jobs');
    elsif s.max_running is not null and coalesce(s.label, '') = '' then
        perform openweights.refuse('invalid_input', 'max_running counts the jobs with a label: give one');
    end if;
    return openweights.check_name(s.id, 250, 'id')
        and openweights.check_name(s.model, 1000, 'model')
        and openweights.check_name(s.docker_image, 1000, 'docker_image')
        and openweights.check_name(s.bundle_file, 200, 'bundle_file')
        and openweights.check_name(array_to_string(s.allowed_hardware, ', '), 2000, 'allowed_hardware')
        and openweights.check_name(array_to_string(s.after, ', '), 20000, 'after')
        -- Linux takes no argument that is longer than 128 KiB.
        and openweights.check_text(s.script, 120000, 'script')
        and openweights.check_params(s.params)
        and openweights.check_number(s.requires_vram_gb, 0, 100000, 'requires_vram_gb')
        and openweights.check_number(s.priority, -1000000, 1000000, 'priority')
        and openweights.check_number(s.max_attempts, 1, 1000, 'max_attempts')
        and openweights.check_number(s.max_cost_usd, 0, 1000000000, 'max_cost_usd')
        and openweights.check_name(s.label, 200, 'label')
        and openweights.check_number(s.max_usd_per_hour, 0, 1000000, 'max_usd_per_hour')
        and openweights.check_number(s.max_running, 1, 100000, 'max_running')
        and openweights.check_number(s.max_duration_s::numeric, 1, 1000000000, 'max_duration_s')
        and openweights.check_number(s.stall_timeout_s::numeric, 1, 1000000000, 'stall_timeout_s')
        and openweights.check_retry(s.retry)
        and openweights.check_moment(s.not_before, 'not_before')
        and openweights.check_moment(s.timeout_at, 'timeout_at');
end $$;

create or replace function openweights.check_worker_row(w public.workers) returns boolean
language plpgsql immutable as $$
begin
    return openweights.check_name(w.docker_image, 1000, 'docker_image')
        and openweights.check_name(w.hardware_type, 200, 'hardware_type')
        and openweights.check_name(w.pod_id, 200, 'pod_id')
        and openweights.check_number(w.gpu_count, 0, 10000, 'gpu_count')
        and openweights.check_number(w.vram_gb, 0, 1000000, 'vram_gb');
end $$;

-- A file's name is a base name: whoever fetches it writes to a path of that name.
create or replace function openweights.check_filename(p_name text) returns boolean
language plpgsql immutable as $$
begin
    if coalesce(p_name, '') in ('', '.', '..') or p_name ~ '[/\\]' then
        perform openweights.refuse('invalid_input', format('%L is no name of a file', left(p_name, 60)));
    end if;
    return openweights.check_name(p_name, 255, 'filename');
end $$;

create or replace function openweights.check_event(p_event jsonb) returns boolean
language plpgsql immutable as $$
begin
    return openweights.check_text(p_event ->> 'key', 200, 'the key of an event')
        and openweights.check_text(p_event::text, 4194304, 'an event')
        and openweights.check_moment((p_event ->> 'created_at')::timestamptz, 'created_at of an event');
end $$;
