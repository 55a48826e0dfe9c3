//! What a container's credential reaches: its own inputs, calls of and by its app, and blobs that it was shown.
//!
//! Which RPCs a container may send at all is `context`'s. Here is what the objects are that it may name in them.
//! It may look functions up by name and call them, as any code of a user may; what others' calls return, others'
//! blobs, code, secrets and files are closed to it. A developer's token opens everything in the workspace.
//!
//! Nothing of this is stored. A blob's name, as containers see it, ends in a signature for their app, without
//! which the name is worth nothing to them; the id of a call carries a mark of the app that made it.

use ionian_control::{Caller, Control};
use ionian_domain::call::Payload;
use ionian_domain::{AppId, BlobId, CallId, ImageId, InputId};
use ionian_proto::client as pb;
use subtle::ConstantTimeEq as _;
use tonic::Status;

use crate::context::Context;
use crate::service::Api;
use crate::{decode, status};

/// Stands between a blob's id and the signature. Neither has it.
const SIGNATURE_MARK: char = '.';
/// Bytes of a signature: guesses are requests, of which nobody sends 2^64.
const SIGNATURE_BYTES: usize = 16;
const PURPOSE: &str = "blob";

/// Names of blobs as one sender sees them.
pub(crate) struct BlobNames<'a> {
    control: &'a Control,
    /// `None`: a developer, who sees plain ids.
    app_id: Option<AppId>,
}

impl<'a> BlobNames<'a> {
    pub(crate) fn of(api: &'a Api, ctx: &Context) -> Self {
        let app_id = match &ctx.caller {
            Caller::Client { .. } => None,
            Caller::Container { entry, .. } => Some(entry.app_id),
        };
        Self {
            control: &api.control,
            app_id,
        }
    }

    fn signature(&self, app_id: AppId, blob_id: &str) -> String {
        hex::encode(&self.control.containers().mark(app_id, PURPOSE, blob_id)[..SIGNATURE_BYTES])
    }

    /// The name to give out for a blob that the sender may read.
    pub(crate) fn show(&self, blob_id: String) -> String {
        match self.app_id {
            None => blob_id,
            Some(app_id) => {
                let signature = self.signature(app_id, &blob_id);
                format!("{blob_id}{SIGNATURE_MARK}{signature}")
            }
        }
    }

    pub(crate) fn show_payload(&self, payload: Payload) -> Payload {
        match payload {
            Payload::Blob(blob_id) => Payload::Blob(self.show(blob_id)),
            inline @ Payload::Inline(_) => inline,
        }
    }

    /// The blob that the sender names, if it may.
    pub(crate) fn read(&self, name: &str) -> Result<BlobId, Status> {
        let Some(app_id) = self.app_id else {
            return decode::id(name);
        };
        let (id, signature) = name.split_once(SIGNATURE_MARK).unwrap_or((name, ""));
        let id: BlobId = decode::id(id)?;
        let given = hex::decode(signature).unwrap_or_default();
        // The same words whether or not there is such a blob.
        let wanted = self.control.containers().mark(app_id, PURPOSE, &id.to_string());
        if !bool::from(given.ct_eq(&wanted[..SIGNATURE_BYTES])) {
            return Err(Status::permission_denied(
                "this blob was not given to this app's containers, and not made by them",
            ));
        }
        Ok(id)
    }

    pub(crate) fn read_in_place(&self, name: &mut String) -> Result<(), Status> {
        *name = self.read(name)?.to_string();
        Ok(())
    }

    pub(crate) fn read_input(&self, input: Option<&mut pb::FunctionInput>) -> Result<(), Status> {
        match input.and_then(|input| input.args_oneof.as_mut()) {
            Some(pb::function_input::ArgsOneof::ArgsBlobId(name)) => self.read_in_place(name),
            Some(pb::function_input::ArgsOneof::Args(_)) | None => Ok(()),
        }
    }

    pub(crate) fn read_result(&self, result: Option<&mut pb::GenericResult>) -> Result<(), Status> {
        match result.and_then(|result| result.data_oneof.as_mut()) {
            Some(pb::generic_result::DataOneof::DataBlobId(name)) => self.read_in_place(name),
            Some(pb::generic_result::DataOneof::Data(_)) | None => Ok(()),
        }
    }
}

/// Refuses a call that is neither of the container's app nor made by it, in the words for one that is not there.
pub(crate) async fn check_call(api: &Api, ctx: &Context, call_id: CallId) -> Result<(), Status> {
    let Caller::Container { entry, .. } = &ctx.caller else {
        return Ok(());
    };
    let is_open = api.control.calls().is_open_to(call_id, entry.app_id).await;
    if is_open.map_err(status::from_error)? {
        return Ok(());
    }
    Err(Status::not_found(format!(
        "function call {call_id} does not exist for this container, which may follow calls of its app's functions and \
         calls that its app made; give the code a token of its own for others"
    )))
}

/// The input whose code makes a call, where the sender may say so. A container's word counts for what it runs.
pub(crate) fn parent(ctx: &Context, input_id: Option<InputId>) -> Option<InputId> {
    match &ctx.caller {
        Caller::Client { .. } => input_id,
        Caller::Container { entry, .. } => input_id.filter(|input_id| entry.holds(*input_id)),
    }
}

/// The app whose code makes a call.
pub(crate) fn origin(ctx: &Context) -> Option<AppId> {
    match &ctx.caller {
        Caller::Client { .. } => None,
        Caller::Container { entry, .. } => Some(entry.app_id),
    }
}

/// Code in a container can give another function no secrets and files but those that it has itself.
pub(crate) fn check_options(ctx: &Context, options: &pb::FunctionOptions) -> Result<(), Status> {
    let Caller::Container { entry, .. } = &ctx.caller else {
        return Ok(());
    };
    let spec = &entry.function.spec;
    let secrets = decode::ids(&options.secret_ids)?;
    let mounts = decode::ids(&options.mount_ids)?;
    let is_own = secrets.iter().all(|id| spec.secret_ids.contains(id))
        && mounts.iter().all(|id| spec.mount_ids.contains(id))
        && options.volume_mounts.iter().all(|wanted| {
            spec.volume_mounts
                .iter()
                .any(|own| own.volume_id.to_string() == wanted.volume_id)
        });
    if is_own {
        return Ok(());
    }
    Err(Status::permission_denied(
        "code in a container can pass on the secrets, files and volumes of its own function only; give it a token of \
         its own for others",
    ))
}

/// A container may look at the image that it runs on.
pub(crate) fn check_image(ctx: &Context, image_id: ImageId) -> Result<(), Status> {
    match &ctx.caller {
        Caller::Container { entry, .. } if entry.function.spec.image_id != Some(image_id) => Err(Status::not_found(
            format!("image {image_id} does not exist for this container, which may look at its own"),
        )),
        Caller::Container { .. } | Caller::Client { .. } => Ok(()),
    }
}

/// Takes out of a definition what makes up the function, so that a container learns how to call it and no more.
pub(crate) fn hide_from_containers(ctx: &Context, definition: &mut pb::Function) {
    match &ctx.caller {
        Caller::Client { .. } => {}
        Caller::Container { .. } => {
            definition.function_serialized.clear();
            definition.class_serialized.clear();
            definition.secret_ids.clear();
            definition.mount_ids.clear();
            definition.image_id.clear();
            definition.object_dependencies.clear();
            definition.volume_mounts.clear();
            definition.shared_volume_mounts.clear();
            definition.cloud_bucket_mounts.clear();
            definition.s3_mounts.clear();
            definition.proxy_id = None;
        }
    }
}
