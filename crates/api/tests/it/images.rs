//! Images: built once, their logs followed, their results kept.

use ionian_proto::client as pb;
use pb::generic_result::GenericStatus;
use tonic::{Code, Status};

use crate::support::{Client, MOMENT, Platform, assert_refused, eventually, within};

fn request(commands: &[&str]) -> pb::ImageGetOrCreateRequest {
    pb::ImageGetOrCreateRequest {
        image: Some(pb::Image {
            dockerfile_commands: commands.iter().map(|&command| command.to_owned()).collect(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

async fn get(platform: &Platform, commands: &[&str]) -> pb::ImageGetOrCreateResponse {
    platform
        .client()
        .image_get_or_create(request(commands))
        .await
        .unwrap()
        .into_inner()
}

/// What the client does until it has a result: reads streams to their ends and reconnects.
async fn join(client: &mut Client, image_id: &str) -> Result<(Vec<String>, pb::ImageJoinStreamingResponse), Status> {
    let mut last_entry_id = String::new();
    let mut lines = Vec::new();
    loop {
        let request = pb::ImageJoinStreamingRequest {
            image_id: image_id.to_owned(),
            timeout: 55.0,
            last_entry_id: last_entry_id.clone(),
            ..Default::default()
        };
        let mut stream = client.image_join_streaming(request).await?.into_inner();
        let mut result = None;
        while let Some(message) = within(stream.message()).await? {
            assert!(result.is_none(), "lines after the result are not printed by the client");
            lines.extend(message.task_logs.iter().map(|line| line.data.clone()));
            last_entry_id.clone_from(&message.entry_id);
            if message.result.is_some() {
                result = Some(message);
            }
        }
        if let Some(result) = result {
            return Ok((lines, result));
        }
    }
}

#[tokio::test]
async fn an_image_is_built_once_and_its_log_is_followed() {
    let platform = Platform::start().await;
    let first = get(&platform, &["FROM x"]).await;
    assert!(first.result.is_none(), "it is not built yet");
    let (lines, last) = join(&mut platform.client(), &first.image_id).await.unwrap();
    assert_eq!(lines, ["=> step 1\n", "=> step 2\n"]);
    assert_eq!(last.result.unwrap().status(), GenericStatus::Success);
    let metadata = last.metadata.unwrap();
    assert_eq!(metadata.python_version_info.as_deref(), Some("Python 3.11.2"));
    assert_eq!(metadata.image_builder_version.as_deref(), Some("2025.06"));
    let again = get(&platform, &["FROM x"]).await;
    assert_eq!(
        (again.image_id.as_str(), again.result.unwrap().status),
        (first.image_id.as_str(), 1)
    );
    assert_eq!(
        again.metadata.unwrap().image_builder_version.as_deref(),
        Some("2025.06")
    );
    assert_eq!(platform.builder.count(), 1);
    let other = get(&platform, &["FROM x", "RUN y"]).await;
    assert_ne!(other.image_id, first.image_id);
    let request = pb::ImageFromIdRequest {
        image_id: first.image_id.clone(),
    };
    let by_id = platform.client().image_from_id(request).await.unwrap().into_inner();
    assert!(by_id.metadata.is_some());
    // Logs of a finished build are read again.
    assert_eq!(join(&mut platform.client(), &first.image_id).await.unwrap().0.len(), 2);
}

#[tokio::test]
async fn two_who_ask_at_once_wait_for_one_build() {
    let platform = Platform::start().await;
    let (one, two) = tokio::join!(get(&platform, &["RUN wait"]), get(&platform, &["RUN wait"]));
    assert_eq!(one.image_id, two.image_id);
    let id = one.image_id;
    let followers: Vec<_> = (0..2)
        .map(|_| {
            let (mut client, id) = (platform.client(), id.clone());
            tokio::spawn(async move { join(&mut client, &id).await })
        })
        .collect();
    tokio::time::sleep(MOMENT).await;
    platform.builder.go_on.notify_one();
    for follower in followers {
        let (lines, last) = within(follower).await.unwrap().unwrap();
        assert_eq!((lines.len(), last.result.unwrap().status), (2, 1));
    }
    assert_eq!(platform.builder.count(), 1);
}

#[tokio::test]
async fn a_stream_that_is_over_is_resumed_where_it_stopped() {
    let platform = Platform::start().await;
    let id = get(&platform, &["RUN wait"]).await.image_id;
    let request = |last_entry_id: &str, timeout: f32| pb::ImageJoinStreamingRequest {
        image_id: id.clone(),
        timeout,
        last_entry_id: last_entry_id.to_owned(),
        ..Default::default()
    };
    let (message, entry_id) = eventually("the first line", || async {
        let mut stream = platform
            .client()
            .image_join_streaming(request("", 0.1))
            .await
            .unwrap()
            .into_inner();
        let message = within(stream.message()).await.unwrap()?;
        assert!(within(stream.message()).await.unwrap().is_none(), "the hold is over");
        Some((message.task_logs[0].data.clone(), message.entry_id))
    })
    .await;
    assert_eq!(message, "=> step 1\n");
    platform.builder.go_on.notify_one();
    let mut stream = platform
        .client()
        .image_join_streaming(request(&entry_id, 55.0))
        .await
        .unwrap()
        .into_inner();
    let message = within(stream.message()).await.unwrap().unwrap();
    assert_eq!(message.task_logs[0].data, "=> step 2\n");
}

#[tokio::test]
async fn a_failed_build_says_what_failed_and_is_tried_again() {
    let platform = Platform::start().await;
    let id = get(&platform, &["RUN fail"]).await.image_id;
    let (lines, last) = join(&mut platform.client(), &id).await.unwrap();
    assert_eq!(lines.len(), 2, "the log comes with the failure");
    let result = last.result.unwrap();
    assert_eq!(result.status(), GenericStatus::Failure);
    assert_eq!(result.exception, "the command 'fail' exited with code 1");
    assert!(get(&platform, &["RUN fail"]).await.result.is_none());
    join(&mut platform.client(), &id).await.unwrap();
    assert_eq!(platform.builder.count(), 2);
}

#[tokio::test]
async fn a_builder_that_crashes_fails_its_image_only() {
    let platform = Platform::start().await;
    let id = get(&platform, &["RUN crash"]).await.image_id;
    let (_, last) = join(&mut platform.client(), &id).await.unwrap();
    assert!(last.result.unwrap().exception.contains("the builder crashed"));
    assert!(get(&platform, &["FROM x"]).await.result.is_none());
}

#[tokio::test]
async fn a_forced_build_builds_again() {
    let platform = Platform::start().await;
    let id = get(&platform, &["FROM x"]).await.image_id;
    join(&mut platform.client(), &id).await.unwrap();
    let forced = pb::ImageGetOrCreateRequest {
        force_build: true,
        ..request(&["FROM x"])
    };
    let answer = platform
        .client()
        .image_get_or_create(forced)
        .await
        .unwrap()
        .into_inner();
    assert_eq!((answer.image_id.as_str(), answer.result), (id.as_str(), None));
    join(&mut platform.client(), &id).await.unwrap();
    assert_eq!(platform.builder.count(), 2);
}

#[tokio::test]
async fn what_cannot_be_built_is_refused_with_a_reason() {
    let platform = Platform::start().await;
    let mut client = platform.client();
    let none = pb::ImageGetOrCreateRequest::default();
    assert_refused(
        client.image_get_or_create(none).await,
        Code::InvalidArgument,
        "no definition",
    );
    let function = pb::ImageGetOrCreateRequest {
        build_function_id: ionian_domain::FunctionId::generate().to_string(),
        ..request(&["FROM x"])
    };
    let words = "`Image.run_function` is not available on this server yet";
    assert_refused(client.image_get_or_create(function).await, Code::Unimplemented, words);
    let mut base = request(&["FROM base"]);
    let missing = ionian_domain::ImageId::generate().to_string();
    base.image.as_mut().unwrap().base_images = vec![pb::BaseImage {
        docker_tag: "base".to_owned(),
        image_id: missing.clone(),
    }];
    assert_refused(client.image_get_or_create(base).await, Code::NotFound, &missing);
}

#[tokio::test]
async fn context_files_and_secrets_reach_the_builder() {
    let platform = Platform::start().await;
    let secret = pb::SecretGetOrCreateRequest {
        object_creation_type: pb::ObjectCreationType::Ephemeral.into(),
        env_dict: [("TOKEN".to_owned(), "hidden".to_owned())].into(),
        ..Default::default()
    };
    let secret_id = platform
        .client()
        .secret_get_or_create(secret)
        .await
        .unwrap()
        .into_inner()
        .secret_id;
    let mut message = request(&["FROM x"]);
    let image = message.image.as_mut().unwrap();
    image.secret_ids = vec![secret_id];
    image.context_files = vec![pb::ImageContextFile {
        filename: "/.req.txt".to_owned(),
        data: "numpy".into(),
    }];
    let id = platform
        .client()
        .image_get_or_create(message)
        .await
        .unwrap()
        .into_inner()
        .image_id;
    join(&mut platform.client(), &id).await.unwrap();
    let job = platform.builder.jobs.lock().remove(0);
    assert_eq!(job.secrets, [("TOKEN".to_owned(), "hidden".to_owned())]);
    assert_eq!(job.context[0].path, "/.req.txt");
    let hash = job.context[0].sha256_hex.parse().unwrap();
    assert_eq!(platform.control.content().read(hash, 100).await.unwrap(), "numpy");
    assert_eq!(job.client_version, "1.6.4");
}
