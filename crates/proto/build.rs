//! Compiles the `.proto` files of this crate with `protox`, so that no `protoc` has to be installed.

use std::error::Error;
use std::path::{Path, PathBuf};

/// The import root: the folder whose sub-folders are package names.
const PROTO_ROOT: &str = "proto";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed={PROTO_ROOT}");

    let mut compiler = protox::Compiler::new([PROTO_ROOT])?;
    compiler.include_imports(true).include_source_info(true);
    // Every file, not only the service: error details and ASGI events are reached by no RPC.
    compiler.open_files(proto_files(Path::new(PROTO_ROOT))?)?;
    let with_comments = compiler.file_descriptor_set();

    // What the binary carries needs no comments.
    compiler.include_source_info(false);
    let out_dir = PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out_dir.join("descriptors.binpb"), compiler.encode_file_descriptor_set())?;

    let mut config = tonic_prost_build::Config::new();
    // Error details travel as `Any`, which names the message. Clients look it up under this domain.
    config.enable_type_names();
    config.type_name_domain(["."], "type.googleapis.com");
    tonic_prost_build::configure()
        .build_client(true)
        .build_server(true)
        // Its `connect` would be in the way of an RPC of that name; channels are made by their users.
        .build_transport(false)
        // A method that the server does not override answers UNIMPLEMENTED.
        .generate_default_stubs(true)
        // Sorted maps: the same message always has the same bytes, and images are keyed by them.
        .btree_map(".")
        // Payloads of up to 128 MiB are sliced, not copied.
        .bytes(".")
        .emit_rerun_if_changed(false)
        .compile_fds_with_config(with_comments, config)?;
    Ok(())
}

/// All `.proto` files below `folder`, sorted, so that two builds give the same bytes.
fn proto_files(folder: &Path) -> Result<Vec<PathBuf>, Box<dyn Error>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(proto_files(&path)?);
        } else if path.extension().is_some_and(|extension| extension == "proto") {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}
