//! Blobs: where to put and where to get large payloads.

use ionian_blobs::{BlobDeclaration, DOWNLOAD_URL_LIFETIME, UPLOAD_URL_LIFETIME};
use ionian_domain::Timestamp;
use ionian_proto::client as pb;
use tonic::Status;

use crate::context::Context;
use crate::reach::BlobNames;
use crate::service::Api;
use crate::status;

/// Answers in both forms: the npm client reads the singular fields, the Python client the plural ones
/// (and takes a single-part URL from some host names only, hence parts).
pub(crate) async fn create(
    api: &Api,
    ctx: &Context,
    request: pb::BlobCreateRequest,
) -> Result<pb::BlobCreateResponse, Status> {
    let declaration = BlobDeclaration::from_wire(
        request.content_length,
        &request.content_md5,
        &request.content_sha256_base64,
    )
    .map_err(|error| status::invalid(error.to_string()))?;
    let upload = api
        .control
        .blobs()
        .create(declaration)
        .await
        .map_err(|error| status::from_kind(error.kind(), &error))?;
    let plan = api
        .signer
        .upload_plan(&ctx.base_url, &upload, Timestamp::now() + UPLOAD_URL_LIFETIME);
    let blob_id = BlobNames::of(api, ctx).show(plan.blob_id.to_string());
    let part_length = i64::try_from(plan.part_length).unwrap_or(i64::MAX);
    let multipart = pb::MultiPartUpload {
        part_length,
        upload_urls: plan.part_urls,
        completion_url: plan.completion_url,
    };
    Ok(pb::BlobCreateResponse {
        blob_ids: vec![blob_id.clone()],
        blob_id,
        upload_type_oneof: Some(pb::blob_create_response::UploadTypeOneof::UploadUrl(
            plan.single_put_url,
        )),
        upload_types_oneof: Some(pb::blob_create_response::UploadTypesOneof::Multiparts(
            pb::MultiPartUploadList { items: vec![multipart] },
        )),
    })
}

pub(crate) async fn get(api: &Api, ctx: &Context, request: pb::BlobGetRequest) -> Result<pb::BlobGetResponse, Status> {
    let id = BlobNames::of(api, ctx).read(&request.blob_id)?;
    api.control
        .blobs()
        .info(id)
        .await
        .map_err(|error| status::from_kind(error.kind(), &error))?;
    let url = api
        .signer
        .download_url(&ctx.base_url, id, Timestamp::now() + DOWNLOAD_URL_LIFETIME);
    Ok(pb::BlobGetResponse { download_url: url })
}
