//! A deploy as the client does it, one request after the other.

use std::collections::BTreeMap;

use bytes::Bytes;
use ionian_domain::{AppId, FunctionId};
use ionian_proto::client as pb;

use super::{Client, Platform};

/// A deploy under way.
pub(crate) struct Deploy {
    pub client: Client,
    pub app_id: String,
    name: String,
    functions: BTreeMap<String, String>,
    classes: BTreeMap<String, String>,
    definitions: BTreeMap<String, String>,
}

pub(crate) struct DeployedApp {
    pub id: AppId,
    pub functions: BTreeMap<String, FunctionId>,
    pub published: pb::AppPublishResponse,
}

impl DeployedApp {
    pub(crate) fn function(&self, tag: &str) -> FunctionId {
        self.functions[tag]
    }
}

impl Deploy {
    /// Finds the app of this name, or creates it.
    pub(super) async fn begin(platform: &Platform, name: &str) -> Self {
        let mut client = platform.client();
        let request = pb::AppGetByDeploymentNameRequest {
            name: name.to_owned(),
            ..Default::default()
        };
        let mut app_id = client
            .app_get_by_deployment_name(request)
            .await
            .unwrap()
            .into_inner()
            .app_id;
        if app_id.is_empty() {
            app_id = create_app(&mut client, name, pb::AppState::Initializing).await;
        }
        Self::into_app(platform, name, app_id)
    }

    /// Publishes into an app that exists.
    pub(crate) fn into_app(platform: &Platform, name: &str, app_id: String) -> Self {
        Self {
            client: platform.client(),
            app_id,
            name: name.to_owned(),
            functions: BTreeMap::new(),
            classes: BTreeMap::new(),
            definitions: BTreeMap::new(),
        }
    }

    pub(crate) async fn function(mut self, tag: &str) -> Self {
        self.create(tag, |_| ()).await;
        self
    }

    pub(crate) async fn function_with(mut self, tag: &str, change: impl FnOnce(&mut pb::Function)) -> Self {
        self.create(tag, change).await;
        self
    }

    pub(crate) async fn create(
        &mut self,
        tag: &str,
        change: impl FnOnce(&mut pb::Function),
    ) -> pb::FunctionCreateResponse {
        let mut function = definition(tag);
        function.image_id = Box::pin(image(&mut self.client, "FROM python:3.11")).await;
        change(&mut function);
        // The futures of requests with a whole definition are large.
        Box::pin(self.send(tag, function)).await
    }

    async fn send(&mut self, tag: &str, function: pb::Function) -> pb::FunctionCreateResponse {
        let precreated = self
            .client
            .function_precreate(pb::FunctionPrecreateRequest {
                app_id: self.app_id.clone(),
                function_name: tag.to_owned(),
                function_type: function.function_type,
                webhook_config: function.webhook_config.clone(),
                method_definitions: function.method_definitions.clone(),
                ..Default::default()
            })
            .await
            .unwrap()
            .into_inner();
        let created = self
            .client
            .function_create(pb::FunctionCreateRequest {
                app_id: self.app_id.clone(),
                function: Some(function),
                existing_function_id: precreated.function_id.clone(),
                ..Default::default()
            })
            .await
            .unwrap()
            .into_inner();
        assert_eq!(created.function_id, precreated.function_id, "the client requires it");
        let definition_id = created.handle_metadata.clone().unwrap().definition_id;
        self.functions.insert(tag.to_owned(), created.function_id.clone());
        self.definitions.insert(created.function_id.clone(), definition_id);
        created
    }

    pub(crate) async fn class(mut self, name: &str) -> Self {
        let request = pb::ClassCreateRequest {
            app_id: self.app_id.clone(),
            only_class_function: true,
            ..Default::default()
        };
        let created = self.client.class_create(request).await.unwrap().into_inner();
        self.classes.insert(name.to_owned(), created.class_id);
        self
    }

    pub(crate) fn publish_request(&self, state: pb::AppState) -> pb::AppPublishRequest {
        pb::AppPublishRequest {
            app_id: self.app_id.clone(),
            name: if state == pb::AppState::Deployed {
                self.name.clone()
            } else {
                String::new()
            },
            app_state: state.into(),
            function_ids: self.functions.clone(),
            class_ids: self.classes.clone(),
            definition_ids: self.definitions.clone(),
            ..Default::default()
        }
    }

    pub(crate) async fn publish(self) -> DeployedApp {
        self.publish_as(pb::AppState::Deployed).await
    }

    pub(crate) async fn publish_as(mut self, state: pb::AppState) -> DeployedApp {
        let request = self.publish_request(state);
        let published = self.client.app_publish(request).await.unwrap().into_inner();
        DeployedApp {
            id: self.app_id.parse().unwrap(),
            functions: self
                .functions
                .iter()
                .map(|(tag, id)| (tag.clone(), id.parse().unwrap()))
                .collect(),
            published,
        }
    }
}

pub(crate) async fn create_app(client: &mut Client, description: &str, state: pb::AppState) -> String {
    let request = pb::AppCreateRequest {
        description: description.to_owned(),
        app_state: state.into(),
        ..Default::default()
    };
    client.app_create(request).await.unwrap().into_inner().app_id
}

/// A definition that asks for nothing special.
pub(crate) fn definition(tag: &str) -> pb::Function {
    pb::Function {
        module_name: "app".to_owned(),
        function_name: tag.to_owned(),
        function_type: pb::function::FunctionType::Function.into(),
        timeout_secs: 60,
        supported_input_formats: vec![pb::DataFormat::Pickle.into(), pb::DataFormat::Cbor.into()],
        supported_output_formats: vec![pb::DataFormat::Pickle.into(), pb::DataFormat::Cbor.into()],
        ..Default::default()
    }
}

/// The id of an image of this definition, once it is built.
pub(crate) async fn image(client: &mut Client, command: &str) -> String {
    let request = pb::ImageGetOrCreateRequest {
        image: Some(pb::Image {
            dockerfile_commands: vec![command.to_owned()],
            ..Default::default()
        }),
        ..Default::default()
    };
    let answer = client.image_get_or_create(request).await.unwrap().into_inner();
    if answer.result.is_none() {
        let request = pb::ImageJoinStreamingRequest {
            image_id: answer.image_id.clone(),
            timeout: 55.0,
            ..Default::default()
        };
        let mut stream = client.image_join_streaming(request).await.unwrap().into_inner();
        while let Some(message) = stream.message().await.unwrap() {
            if let Some(result) = message.result {
                assert_eq!(result.status, 1, "{}", result.exception);
            }
        }
    }
    answer.image_id
}

pub(crate) fn cbor_input(index: i32, args: &[u8]) -> pb::FunctionPutInputsItem {
    pb::FunctionPutInputsItem {
        idx: index,
        input: Some(pb::FunctionInput {
            args_oneof: Some(pb::function_input::ArgsOneof::Args(Bytes::copy_from_slice(args))),
            data_format: pb::DataFormat::Cbor.into(),
            ..Default::default()
        }),
        ..Default::default()
    }
}
