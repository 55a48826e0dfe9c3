//! The messages that travel between the client, the server and its containers, generated from the `.proto` files
//! of this crate.
//!
//! The files of `modal.client` are ours: names, types and numbers are what the official client uses, and a test compares them with the
//! descriptors inside the installed client packages (`e2e/test_protocol_schema.py`). They hold what this server uses
//! and every field of it, because declarations are sent back to the client and handed to containers: a field that
//! was missing here would be lost on the way.
//!
//! Only the crates `api` and `worker` name these types; everybody else speaks `domain`.
//!
//! A method of the generated server trait that is not overridden answers `UNIMPLEMENTED`; so does, by the router's
//! fallback, every RPC that is not in `service.proto`.

/// The `modal.client` package.
///
/// Maps are `BTreeMap`s, hence equal messages have equal encodings; `bytes` fields are `bytes::Bytes`.
#[allow(
    clippy::all,
    clippy::pedantic,
    unreachable_pub,
    rustdoc::all,
    reason = "generated code, with names that the protocol gave"
)]
pub mod client {
    tonic::include_proto!("modal.client");
}

/// The `ionian.worker.v1` package: what the control process and a worker of its own say to each other.
#[allow(
    clippy::all,
    clippy::pedantic,
    unreachable_pub,
    rustdoc::all,
    reason = "generated code"
)]
pub mod worker {
    tonic::include_proto!("ionian.worker.v1");
}

/// The encoded `google.protobuf.FileDescriptorSet` of everything in this crate, without comments.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.binpb"));

#[cfg(test)]
mod tests {
    use prost::{Message, Name};

    use crate::client::{Image, RpcRetryPolicy};

    #[test]
    fn equal_maps_have_equal_encodings() {
        let arguments = |names: [&str; 3]| Image {
            build_args: names
                .into_iter()
                .map(|name| (name.to_owned(), "1".to_owned()))
                .collect(),
            ..Image::default()
        };
        let encoded = arguments(["A", "B", "C"]).encode_to_vec();
        assert_eq!(encoded, arguments(["C", "A", "B"]).encode_to_vec());
        assert_ne!(encoded, arguments(["A", "B", "D"]).encode_to_vec());
    }

    #[test]
    fn error_details_are_named_as_the_client_expects() {
        assert_eq!(RpcRetryPolicy::full_name(), "modal.client.RPCRetryPolicy");
        let detail = prost_types::Any::from_msg(&RpcRetryPolicy { retry_after_secs: 1.5 }).unwrap();
        assert_eq!(detail.type_url, "type.googleapis.com/modal.client.RPCRetryPolicy");
    }

    #[test]
    fn the_descriptors_hold_the_services_and_no_comments() {
        let set = prost_types::FileDescriptorSet::decode(crate::FILE_DESCRIPTOR_SET).unwrap();
        let services: Vec<&str> = set
            .file
            .iter()
            .flat_map(|file| &file.service)
            .map(prost_types::ServiceDescriptorProto::name)
            .collect();
        assert_eq!(services, ["Workers", "ModalClient"]);
        assert!(set.file.iter().all(|file| file.source_code_info.is_none()));
    }
}
