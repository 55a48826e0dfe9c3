-- What the second schema adds to the rows of the first: containers that outlive the server.

INSERT INTO containers (id, app_id, function_id, created_at, worker_id, definition_id) VALUES
    ('ta-0000000000000000000003', 'ap-0000000000000000000001', 'fu-0000000000000000000001', 5, 'wk-0000000000000000000001', 'de-0000000000000000000001');
INSERT INTO containers (id, app_id, function_id, created_at, worker_id, definition_id, web_endpoints, web_ready_at) VALUES
    ('ta-0000000000000000000004', 'ap-0000000000000000000001', 'fu-0000000000000000000001', 5, 'wk-0000000000000000000001', 'de-0000000000000000000001', '[]', 7);
UPDATE calls SET input_count = 3 WHERE id = 'fc-0000000000000000000001';
INSERT INTO inputs (id, call_id, function_id, input_index, attempt, retries_used, container_id, started_at, not_before, created_at, finished) VALUES
    ('in-0000000000000000000003', 'fc-0000000000000000000001', 'fu-0000000000000000000001', 2, 0, 0, 'ta-0000000000000000000003', 6, NULL, 1, FALSE);
