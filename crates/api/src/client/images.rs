//! Images.

use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use futures_util::Stream;
use ionian_blobs::ContentHash;
use ionian_domain::image::{ContextFile, Image, ImageSpec, ImageState, RegistryAuth};
use ionian_proto::client as pb;
use tonic::Status;

use crate::context::Context;
use crate::reach;
use crate::service::Api;
use crate::{decode, encode, status};

/// The client reconnects when a stream ends without a result.
const MAX_HOLD: Duration = Duration::from_mins(1);

pub(crate) async fn get_or_create(
    api: &Api,
    ctx: &Context,
    request: pb::ImageGetOrCreateRequest,
) -> Result<pb::ImageGetOrCreateResponse, Status> {
    let message = request
        .image
        .ok_or_else(|| status::invalid("the image has no definition"))?;
    let builder_version = if request.builder_version.is_empty() {
        api.control.config().image_builder_version.clone()
    } else {
        request.builder_version
    };
    let spec = spec(api, message, &request.build_function_id, builder_version).await?;
    let force = request.force_build || request.ignore_cache;
    let app_id = decode::optional_id(&request.app_id)?;
    let client_version = ctx.caller.client_version();
    let image = api
        .control
        .images()
        .get_or_create(spec, app_id, client_version, force)
        .await
        .map_err(status::from_error)?;
    Ok(pb::ImageGetOrCreateResponse {
        image_id: image.id.to_string(),
        result: encode::image_result(&image.state),
        metadata: metadata(&image),
    })
}

fn metadata(image: &Image) -> Option<pb::ImageMetadata> {
    match &image.state {
        ImageState::Ready { image: built } => Some(encode::image_metadata(built, &image.spec.builder_version)),
        ImageState::Building | ImageState::Failed { .. } => None,
    }
}

async fn spec(
    api: &Api,
    message: pb::Image,
    build_function_id: &str,
    builder_version: String,
) -> Result<ImageSpec, Status> {
    if !message.volume_mounts.is_empty() {
        return Err(Status::unimplemented(
            "volumes in image builds are not available on this server yet",
        ));
    }
    let mut context_files = Vec::new();
    for file in message.context_files {
        context_files.push(ContextFile {
            sha256_hex: keep(api, file.data).await?,
            name: file.filename,
        });
    }
    let registry_auth = match message.image_registry_config {
        None => RegistryAuth::Public,
        Some(config) => match config.registry_auth_type() {
            pb::RegistryAuthType::Unspecified | pb::RegistryAuthType::Public => RegistryAuth::Public,
            pb::RegistryAuthType::StaticCreds => RegistryAuth::Static(decode::id(&config.secret_id)?),
            pb::RegistryAuthType::Aws => RegistryAuth::Aws(decode::id(&config.secret_id)?),
            pb::RegistryAuthType::Gcp => RegistryAuth::Gcp(decode::id(&config.secret_id)?),
        },
    };
    Ok(ImageSpec {
        base_images: message
            .base_images
            .into_iter()
            .map(|base| Ok((base.docker_tag, decode::id(&base.image_id)?)))
            .collect::<Result<_, Status>>()?,
        dockerfile_commands: message.dockerfile_commands,
        context_files,
        context_mount_id: decode::optional_id(&message.context_mount_id)?,
        secret_ids: decode::ids(&message.secret_ids)?,
        build_args: message.build_args,
        registry_auth,
        gpu: message.gpu_config.filter(|gpu| gpu.count > 0).map(|gpu| gpu.gpu_type),
        build_function_id: decode::optional_id(build_function_id)?,
        builder_version,
    })
}

/// Puts a context file's bytes where files are kept by content.
async fn keep(api: &Api, data: Bytes) -> Result<String, Status> {
    let hash = ContentHash::of(&data);
    api.control
        .content()
        .put(hash, data)
        .await
        .map_err(|error| status::from_kind(error.kind(), &error))?;
    Ok(hash.to_string())
}

type JoinStream = Pin<Box<dyn Stream<Item = Result<pb::ImageJoinStreamingResponse, Status>> + Send>>;

/// The build's log as it is written, then its result.
pub(crate) async fn join(api: &Api, _: &Context, request: pb::ImageJoinStreamingRequest) -> Result<JoinStream, Status> {
    let id = decode::id(&request.image_id)?;
    let from: u64 = request
        .last_entry_id
        .split('-')
        .next()
        .and_then(|number| number.parse().ok())
        .unwrap_or(0);
    let deadline = tokio::time::Instant::now() + decode::seconds(request.timeout).min(MAX_HOLD);
    let control = api.control.clone();
    let stream = futures_util::stream::try_unfold(Some(from), move |from| {
        let control = control.clone();
        async move {
            let Some(from) = from else { return Ok(None) };
            let hold = deadline.saturating_duration_since(tokio::time::Instant::now());
            let page = control
                .images()
                .build_log(id, from, hold)
                .await
                .map_err(status::from_error)?;
            let Some(state) = page.result else {
                if page.lines.is_empty() {
                    // The hold is over; the client comes back with the last entry id.
                    return Ok(None);
                }
                let response = pb::ImageJoinStreamingResponse {
                    task_logs: page.lines.into_iter().map(encode::build_line).collect(),
                    entry_id: format!("{}-0", page.next),
                    ..pb::ImageJoinStreamingResponse::default()
                };
                return Ok(Some((response, Some(page.next))));
            };
            let builder_version = control
                .images()
                .get(id)
                .await
                .map_err(status::from_error)?
                .spec
                .builder_version;
            let metadata = match &state {
                ImageState::Ready { image } => Some(encode::image_metadata(image, &builder_version)),
                ImageState::Building | ImageState::Failed { .. } => None,
            };
            let response = pb::ImageJoinStreamingResponse {
                result: encode::image_result(&state),
                entry_id: format!("{}-0", page.next),
                eof: true,
                metadata,
                ..pb::ImageJoinStreamingResponse::default()
            };
            Ok(Some((response, None)))
        }
    });
    Ok(Box::pin(stream))
}

pub(crate) async fn from_id(
    api: &Api,
    ctx: &Context,
    request: pb::ImageFromIdRequest,
) -> Result<pb::ImageFromIdResponse, Status> {
    let id = decode::id(&request.image_id)?;
    reach::check_image(ctx, id)?;
    let image = api.control.images().get(id).await.map_err(status::from_error)?;
    let metadata = metadata(&image)
        .ok_or_else(|| Status::failed_precondition(format!("image {} is not built", request.image_id)))?;
    Ok(pb::ImageFromIdResponse {
        image_id: image.id.to_string(),
        metadata: Some(metadata),
    })
}
