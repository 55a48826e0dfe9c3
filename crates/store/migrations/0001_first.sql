-- Conventions of every table:
--   ids are TEXT in their wire form; times are microseconds since the Unix epoch;
--   a struct that is only ever read whole is JSON in one TEXT column;
--   "position" counts rows in the order of their creation, because ids are random and many rows of a
--   turn share one time.

CREATE TABLE meta (
    key   TEXT PRIMARY KEY NOT NULL,
    value BLOB NOT NULL
);

CREATE TABLE tokens (
    id           TEXT PRIMARY KEY NOT NULL,
    name         TEXT NOT NULL,
    secret_hash  BLOB NOT NULL,
    created_at   BIGINT NOT NULL,
    revoked_at   BIGINT,
    last_used_at BIGINT
);

CREATE TABLE environments (
    id         TEXT PRIMARY KEY NOT NULL,
    name       TEXT NOT NULL UNIQUE,
    web_suffix TEXT NOT NULL,
    is_default BOOLEAN NOT NULL,
    created_at BIGINT NOT NULL
);

-- At most one default.
CREATE UNIQUE INDEX environments_default ON environments (is_default) WHERE is_default;

CREATE TABLE apps (
    id             TEXT PRIMARY KEY NOT NULL,
    environment_id TEXT NOT NULL REFERENCES environments (id) ON DELETE CASCADE,
    name           TEXT,
    description    TEXT NOT NULL,
    state          TEXT NOT NULL,
    created_at     BIGINT NOT NULL,
    deployed_at    BIGINT,
    stopped_at     BIGINT,
    version        BIGINT NOT NULL,
    layout         TEXT NOT NULL,
    tags           TEXT NOT NULL
);

CREATE INDEX apps_by_name ON apps (environment_id, name, created_at);
CREATE INDEX apps_by_state ON apps (state);

CREATE TABLE app_versions (
    app_id         TEXT NOT NULL REFERENCES apps (id) ON DELETE CASCADE,
    version        BIGINT NOT NULL,
    layout         TEXT NOT NULL,
    -- Function id to definition id: what a rollback puts back.
    definitions    TEXT NOT NULL,
    deployed_at    BIGINT NOT NULL,
    deployed_by    TEXT NOT NULL,
    client_version TEXT NOT NULL,
    tag            TEXT NOT NULL,
    PRIMARY KEY (app_id, version)
);

CREATE TABLE functions (
    id                      TEXT PRIMARY KEY NOT NULL,
    app_id                  TEXT NOT NULL REFERENCES apps (id) ON DELETE CASCADE,
    -- The newest definition, which may be a draft.
    definition_id           TEXT NOT NULL,
    -- Written by a publish; NULL before the first.
    published_definition_id TEXT,
    binding_base            TEXT REFERENCES functions (id) ON DELETE CASCADE,
    binding_params          BLOB,
    created_at              BIGINT NOT NULL
);

CREATE INDEX functions_by_app ON functions (app_id);
CREATE INDEX functions_by_base ON functions (binding_base) WHERE binding_base IS NOT NULL;

CREATE TABLE function_definitions (
    id          TEXT PRIMARY KEY NOT NULL,
    function_id TEXT NOT NULL REFERENCES functions (id) ON DELETE CASCADE,
    spec        TEXT NOT NULL,
    created_at  BIGINT NOT NULL,
    -- The message as the client sent it.
    definition  BLOB NOT NULL
);

CREATE INDEX function_definitions_by_function ON function_definitions (function_id);

CREATE TABLE classes (
    id     TEXT PRIMARY KEY NOT NULL,
    app_id TEXT NOT NULL REFERENCES apps (id) ON DELETE CASCADE,
    name   TEXT NOT NULL,
    UNIQUE (app_id, name)
);

CREATE TABLE images (
    id         TEXT PRIMARY KEY NOT NULL,
    app_id     TEXT,
    spec       TEXT NOT NULL,
    -- The tag of state_detail, for queries.
    state      TEXT NOT NULL,
    created_at BIGINT NOT NULL,
    state_detail TEXT NOT NULL
);

CREATE INDEX images_building ON images (created_at) WHERE state = 'building';
CREATE INDEX images_by_time ON images (created_at);

CREATE TABLE mounts (
    id           TEXT PRIMARY KEY NOT NULL,
    checksum_hex TEXT NOT NULL,
    files        TEXT NOT NULL
);

CREATE TABLE named_mounts (
    name     TEXT PRIMARY KEY NOT NULL,
    mount_id TEXT NOT NULL REFERENCES mounts (id)
);

CREATE TABLE secrets (
    id             TEXT PRIMARY KEY NOT NULL,
    environment_id TEXT NOT NULL REFERENCES environments (id) ON DELETE CASCADE,
    name           TEXT,
    app_id         TEXT,
    keys           TEXT NOT NULL,
    sealed         BLOB NOT NULL,
    created_at     BIGINT NOT NULL,
    updated_at     BIGINT NOT NULL,
    last_used_at   BIGINT,
    UNIQUE (environment_id, name)
);

CREATE INDEX secrets_by_time ON secrets (environment_id, created_at) WHERE name IS NOT NULL;

CREATE TABLE web_labels (
    environment_id TEXT NOT NULL REFERENCES environments (id) ON DELETE CASCADE,
    label          TEXT NOT NULL,
    app_id         TEXT NOT NULL REFERENCES apps (id) ON DELETE CASCADE,
    function_id    TEXT NOT NULL,
    method         TEXT,
    PRIMARY KEY (environment_id, label)
);

CREATE INDEX web_labels_by_app ON web_labels (app_id);

-- The call lane. Its rows refer to apps and functions without a foreign key: every input would pay
-- for the look-up, and calls are swept by age, not with their app.

CREATE TABLE calls (
    position         INTEGER PRIMARY KEY,
    id               TEXT NOT NULL UNIQUE,
    app_id           TEXT NOT NULL,
    function_id      TEXT NOT NULL,
    kind             TEXT NOT NULL,
    invocation       TEXT NOT NULL,
    parent_input_id  TEXT,
    created_at       BIGINT NOT NULL,
    -- The number of inputs that the client announced; NULL while it may put more.
    finished_inputs  BIGINT,
    input_count      BIGINT NOT NULL,
    finished_count   BIGINT NOT NULL,
    last_sequence    BIGINT NOT NULL,
    -- When an input was last put or finished.
    last_activity_at BIGINT NOT NULL,
    consumed         BOOLEAN NOT NULL,
    -- No more inputs will come, and all that came have finished. The rule is in turn.rs.
    finished         BOOLEAN NOT NULL
);

CREATE INDEX calls_pending ON calls (position) WHERE NOT finished;
CREATE INDEX calls_finished ON calls (last_activity_at) WHERE finished;
CREATE INDEX calls_consumed ON calls (last_activity_at) WHERE finished AND consumed;
CREATE INDEX calls_by_app ON calls (app_id, position);
CREATE INDEX calls_by_function ON calls (function_id, position);

CREATE TABLE inputs (
    position     INTEGER PRIMARY KEY,
    id           TEXT NOT NULL UNIQUE,
    call_id      TEXT NOT NULL REFERENCES calls (id) ON DELETE CASCADE,
    function_id  TEXT NOT NULL,
    input_index  BIGINT NOT NULL,
    attempt      BIGINT NOT NULL,
    retries_used BIGINT NOT NULL,
    -- Both set while an attempt is with a container.
    container_id TEXT,
    started_at   BIGINT,
    not_before   BIGINT,
    created_at   BIGINT NOT NULL,
    finished     BOOLEAN NOT NULL
);

-- Not unique: a client that counts wrongly must not fail the turn of everybody else.
CREATE INDEX inputs_by_call ON inputs (call_id, input_index);
CREATE INDEX inputs_pending ON inputs (position) WHERE NOT finished;

CREATE TABLE input_payloads (
    input_id    TEXT PRIMARY KEY NOT NULL REFERENCES inputs (id) ON DELETE CASCADE,
    data_format BIGINT NOT NULL,
    method_name TEXT,
    -- Exactly one of the two is set.
    blob_id     TEXT,
    inline      BLOB
);

CREATE TABLE outputs (
    input_id               TEXT PRIMARY KEY NOT NULL REFERENCES inputs (id) ON DELETE CASCADE,
    call_id                TEXT NOT NULL,
    sequence               BIGINT NOT NULL,
    attempt                BIGINT NOT NULL,
    container_id           TEXT,
    started_at             BIGINT,
    finished_at            BIGINT NOT NULL,
    -- The protocol's number.
    status                 BIGINT NOT NULL,
    exit_code              BIGINT NOT NULL,
    data_format            BIGINT NOT NULL,
    -- Exactly one of blob_id and inline is set.
    blob_id                TEXT,
    exception              TEXT NOT NULL,
    traceback              TEXT NOT NULL,
    serialized_traceback   BLOB NOT NULL,
    traceback_line_cache   BLOB NOT NULL,
    inline                 BLOB,
    UNIQUE (call_id, sequence)
);

CREATE TABLE containers (
    position    INTEGER PRIMARY KEY,
    id          TEXT NOT NULL UNIQUE,
    app_id      TEXT NOT NULL,
    function_id TEXT NOT NULL,
    created_at  BIGINT NOT NULL,
    ended_at    BIGINT,
    exit        TEXT
);

CREATE INDEX containers_live ON containers (position) WHERE ended_at IS NULL;
CREATE INDEX containers_ended ON containers (ended_at) WHERE ended_at IS NOT NULL;
CREATE INDEX containers_by_app ON containers (app_id, position);

CREATE TABLE idempotency (
    key      TEXT NOT NULL,
    rpc      TEXT NOT NULL,
    at       BIGINT NOT NULL,
    response BLOB NOT NULL,
    PRIMARY KEY (key, rpc)
);

CREATE INDEX idempotency_by_time ON idempotency (at);
