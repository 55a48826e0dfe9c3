//! Mounts: content-addressed files.

use ionian_blobs::{ContentError, ContentHash};
use ionian_domain::Timestamp;
use ionian_domain::mount::MountFile;
use ionian_proto::client as pb;
use tonic::Status;

use crate::context::Context;
use crate::service::Api;
use crate::{decode, encode, status};

/// The client asks for 64 at a time.
const MAX_HASHES: usize = 10_000;
/// The whole set is looked up, one by one.
const MAX_FILES: usize = ionian_control::app::mounts::MAX_MOUNT_FILES;

fn hash(text: &str) -> Result<ContentHash, Status> {
    text.parse()
        .map_err(|error: ionian_blobs::InvalidHash| status::invalid(error.to_string()))
}

fn content_error(error: &ContentError) -> Status {
    status::from_kind(error.kind(), error)
}

pub(crate) async fn check_existence(
    api: &Api,
    _: &Context,
    request: pb::MountBatchedCheckExistenceRequest,
) -> Result<pb::MountBatchedCheckExistenceResponse, Status> {
    if request.sha256_hex_hashes.len() > MAX_HASHES {
        return Err(status::invalid(format!(
            "at most {MAX_HASHES} files can be asked about at once"
        )));
    }
    let hashes: Vec<ContentHash> = request
        .sha256_hex_hashes
        .iter()
        .map(|text| hash(text))
        .collect::<Result<_, _>>()?;
    let missing = api
        .control
        .content()
        .missing(&hashes)
        .await
        .map_err(|error| content_error(&error))?;
    Ok(pb::MountBatchedCheckExistenceResponse {
        missing_sha256_hex_hashes: missing.iter().map(ToString::to_string).collect(),
        checked_at: Some(encode::proto_timestamp(Timestamp::now())),
    })
}

/// A request without data asks whether the file is there.
pub(crate) async fn put_file(
    api: &Api,
    _: &Context,
    request: pb::MountPutFileRequest,
) -> Result<pb::MountPutFileResponse, Status> {
    let hash = hash(&request.sha256_hex)?;
    let content = api.control.content();
    let exists = match request.data_oneof {
        Some(pb::mount_put_file_request::DataOneof::Data(bytes)) => {
            content.put(hash, bytes).await.map_err(|error| content_error(&error))?;
            true
        }
        Some(pb::mount_put_file_request::DataOneof::DataBlobId(blob_id)) => {
            content
                .put_from_blob(hash, api.control.blobs(), decode::id(&blob_id)?)
                .await
                .map_err(|error| content_error(&error))?;
            true
        }
        None => content.contains(hash).await.map_err(|error| content_error(&error))?,
    };
    Ok(pb::MountPutFileResponse {
        exists,
        checked_at: Some(encode::proto_timestamp(Timestamp::now())),
    })
}

pub(crate) async fn get_or_create(
    api: &Api,
    _: &Context,
    request: pb::MountGetOrCreateRequest,
) -> Result<pb::MountGetOrCreateResponse, Status> {
    let mount = if request.files.is_empty() && !request.deployment_name.is_empty() {
        api.control
            .mounts()
            .get_global(&request.deployment_name)
            .await
            .map_err(status::from_error)?
    } else {
        if request.files.len() > MAX_FILES {
            return Err(status::invalid(format!(
                "the mount has {} files; at most {MAX_FILES} are supported: exclude what is not needed with `ignore=`",
                request.files.len()
            )));
        }
        let mut files = Vec::with_capacity(request.files.len());
        let mut hashes = Vec::with_capacity(request.files.len());
        for file in request.files {
            hashes.push(hash(&file.sha256_hex)?);
            files.push(MountFile {
                path: file.filename,
                sha256_hex: file.sha256_hex,
                mode: file.mode,
            });
        }
        let missing = api
            .control
            .content()
            .missing(&hashes)
            .await
            .map_err(|error| content_error(&error))?;
        if let Some(first) = missing.first() {
            return Err(Status::failed_precondition(format!(
                "{} of the mount's files were not uploaded (the first is {first}); deploy again",
                missing.len()
            )));
        }
        api.control.mounts().create(files).await.map_err(status::from_error)?
    };
    Ok(pb::MountGetOrCreateResponse {
        mount_id: mount.id.to_string(),
        handle_metadata: Some(pb::MountHandleMetadata {
            content_checksum_sha256_hex: mount.checksum_hex,
        }),
    })
}
