-- Rows as the first schema held them; see the test that includes this.
INSERT INTO meta VALUES ('workspace', CAST('ac-1' AS BLOB));
INSERT INTO tokens VALUES ('ak-0000000000000000000001', 'laptop', x'0101010101010101010101010101010101010101010101010101010101010101', 1, NULL, NULL);
INSERT INTO environments VALUES ('en-0000000000000000000001', 'main', '', TRUE, 1);
INSERT INTO apps VALUES ('ap-0000000000000000000001', 'en-0000000000000000000001', 'hello', 'hello', 'deployed', 1, 2, NULL, 1,
    '{"functions":{"f":"fu-0000000000000000000001"},"classes":{"C":"cs-0000000000000000000001"}}', '{"team":"a"}');
INSERT INTO app_versions VALUES ('ap-0000000000000000000001', 1,
    '{"functions":{"f":"fu-0000000000000000000001"},"classes":{"C":"cs-0000000000000000000001"}}',
    '{"fu-0000000000000000000001":"de-0000000000000000000001"}', 2, 'me', '1.6.4', '');
INSERT INTO functions VALUES ('fu-0000000000000000000001', 'ap-0000000000000000000001', 'de-0000000000000000000001',
    'de-0000000000000000000001', NULL, NULL, 1);
INSERT INTO function_definitions VALUES ('de-0000000000000000000001', 'fu-0000000000000000000001',
    '{"name":"f","kind":"function","is_class":false,"is_server":false,"image_id":"im-0000000000000000000001","mount_ids":["mo-0000000000000000000001"],"secret_ids":["st-0000000000000000000001"],"volume_mounts":[{"volume_id":"vo-0000000000000000000001","path":"/data","read_only":false,"sub_path":null}],"object_dependencies":["im-0000000000000000000001"],"resources":{"memory_mib":128,"memory_limit_mib":null,"cpu_millis":125,"cpu_limit_millis":null,"ephemeral_disk_mib":null,"gpu":{"kind":"H100","count":1}},"timeout":{"secs":300,"nanos":0},"startup_timeout":{"secs":300,"nanos":0},"autoscaler":{"min_containers":0,"max_containers":4,"buffer_containers":0,"scaledown_window":{"secs":60,"nanos":0}},"concurrency":{"max_inputs":1,"target_inputs":1},"batching":{"max_size":4,"wait":{"secs":0,"nanos":20000000}},"retry":{"max_retries":0,"backoff_coefficient":1.0,"initial_delay":{"secs":0,"nanos":0},"max_delay":{"secs":0,"nanos":0}},"web":{"kind":"asgi_app","label":"hello-f","label_truncated":false,"requires_proxy_auth":false,"port":null,"startup_timeout":{"secs":5,"nanos":0}},"web_methods":[],"methods":[],"mount_client_dependencies":true,"client_version":"1.6.4"}',
    1, x'0102');
INSERT INTO classes VALUES ('cs-0000000000000000000001', 'ap-0000000000000000000001', 'C');
INSERT INTO images (id, app_id, spec, state, state_detail, created_at) VALUES ('im-0000000000000000000001', 'ap-0000000000000000000001',
    '{"base_images":[["base","im-0000000000000000000002"]],"dockerfile_commands":["FROM base","RUN true"],"context_files":[{"name":"/a","sha256_hex":"00"}],"context_mount_id":null,"secret_ids":[],"build_args":{"A":"b"},"registry_auth":{"static":"st-0000000000000000000001"},"gpu":null,"build_function_id":null,"builder_version":"2025.06"}',
    'ready',
    '{"state":"ready","image":{"layers":["layer-1"],"config":{"env":[["PATH","/usr/bin"]],"workdir":"/root","user":null,"entrypoint":[],"cmd":["python"],"shell":[]},"metadata":{"python_version_info":"Python 3.11.2","libc_version_info":"glibc 2.36","python_packages":{"fastapi":"0.115.0"}}}}',
    1);
INSERT INTO mounts VALUES ('mo-0000000000000000000001', '00', '[{"path":"/a","sha256_hex":"00","mode":420}]');
INSERT INTO named_mounts VALUES ('modal-client-mount-1.6.4', 'mo-0000000000000000000001');
INSERT INTO secrets VALUES ('st-0000000000000000000001', 'en-0000000000000000000001', 'key', NULL, '["API_KEY"]', x'00', 1, 1, NULL);
INSERT INTO web_labels VALUES ('en-0000000000000000000001', 'hello-f', 'ap-0000000000000000000001', 'fu-0000000000000000000001', NULL);
INSERT INTO calls (id, app_id, function_id, kind, invocation, parent_input_id, created_at, finished_inputs, input_count, finished_count, last_sequence, last_activity_at, consumed, finished)
    VALUES ('fc-0000000000000000000001', 'ap-0000000000000000000001', 'fu-0000000000000000000001', 'map', 'sync_legacy', NULL, 1, NULL, 2, 1, 1, 3, FALSE, FALSE);
INSERT INTO inputs (id, call_id, function_id, input_index, attempt, retries_used, container_id, started_at, not_before, created_at, finished) VALUES
    ('in-0000000000000000000001', 'fc-0000000000000000000001', 'fu-0000000000000000000001', 0, 0, 0, NULL, NULL, NULL, 1, TRUE),
    ('in-0000000000000000000002', 'fc-0000000000000000000001', 'fu-0000000000000000000001', 1, 1, 1, NULL, NULL, 5, 1, FALSE);
INSERT INTO input_payloads VALUES
    ('in-0000000000000000000001', 1, NULL, NULL, x'00'),
    ('in-0000000000000000000002', 1, 'm', 'bl-1', NULL);
INSERT INTO outputs VALUES ('in-0000000000000000000001', 'fc-0000000000000000000001', 1, 0, 'ta-0000000000000000000001', 2, 3, 2, 0, 1, NULL, 'ValueError()', 'Traceback', x'', x'', x'00');
INSERT INTO containers (id, app_id, function_id, created_at, ended_at, exit) VALUES
    ('ta-0000000000000000000001', 'ap-0000000000000000000001', 'fu-0000000000000000000001', 1, 1700000000000009, '{"Exited":{"code":1}}');
INSERT INTO idempotency VALUES ('k', 'FunctionMap', 1, x'03');
