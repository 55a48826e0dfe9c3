-- What a restarted server needs to go on with containers that outlived it.

ALTER TABLE containers ADD COLUMN worker_id TEXT;
ALTER TABLE containers ADD COLUMN definition_id TEXT;
-- Where its web endpoints listen (JSON), and since when; noted behind the announcement.
ALTER TABLE containers ADD COLUMN web_endpoints TEXT;
ALTER TABLE containers ADD COLUMN web_ready_at BIGINT;
