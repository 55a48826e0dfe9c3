#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ionian_fuzz_harness::grpc::run(data));
