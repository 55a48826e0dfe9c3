#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ionian_fuzz_harness::http_front::run(data));
