//! A web request over the official runtime's own data channel.

use bytes::Bytes;
use ionian_control::data_channel::{FromApp, ToApp, WebScope};
use ionian_domain::web::{PoolEvent, WebTarget};
use ionian_proto::client as pb;
use pb::asgi::{self, Type};
use prost::Message as _;
use tonic::Code;

use crate::support::container::args_of;
use crate::support::{Container, MOMENT, Platform, assert_refused, within};

fn scope() -> WebScope {
    WebScope {
        websocket: false,
        http_version: "1.1".to_owned(),
        method: "POST".to_owned(),
        scheme: "https".to_owned(),
        path: "/items".to_owned(),
        query_string: Bytes::from("a=1"),
        headers: vec![("host".into(), "example.test".into())],
        client: Some(("192.0.2.7".to_owned(), 4711)),
        subprotocols: Vec::new(),
    }
}

async fn web_container(platform: &mut Platform) -> Container {
    let deploy = platform.deploy("app").await.function_with("web", |function| {
        function.warm_pool_size = 1;
        function.webhook_config = Some(pb::WebhookConfig {
            r#type: pb::WebhookType::AsgiApp.into(),
            ..Default::default()
        });
    });
    let app = deploy.await.publish().await;
    platform.container(app.function("web")).await
}

async fn ready(platform: &mut Platform) -> Vec<(Option<String>, WebTarget)> {
    loop {
        if let Some(PoolEvent::Ready { targets, .. }) = within(platform.web.pool.recv()).await {
            return targets;
        }
    }
}

fn out(call: &str, index: u64, kind: Type) -> pb::FunctionCallPutDataRequest {
    let event = pb::Asgi { r#type: Some(kind) };
    pb::FunctionCallPutDataRequest {
        call_info: Some(pb::function_call_put_data_request::CallInfo::FunctionCallId(
            call.to_owned(),
        )),
        data_chunks: vec![pb::DataChunk {
            data_format: pb::DataFormat::Asgi.into(),
            index,
            data_oneof: Some(pb::data_chunk::DataOneof::Data(event.encode_to_vec().into())),
        }],
    }
}

fn data_in(call: &str) -> pb::FunctionCallGetDataRequest {
    pb::FunctionCallGetDataRequest {
        call_info: Some(pb::function_call_get_data_request::CallInfo::FunctionCallId(
            call.to_owned(),
        )),
        ..Default::default()
    }
}

#[tokio::test]
async fn a_request_goes_in_and_its_response_comes_out() {
    let mut platform = Platform::start().await;
    let container = web_container(&mut platform).await;
    // The first poll makes the container ready, and gets the first request.
    let polling = tokio::spawn(async move {
        let input = container.next().await;
        (container, input)
    });
    assert_eq!(ready(&mut platform).await, [(None, WebTarget::DataChannel)]);
    let id = platform.control.snapshot().borrow()[0].id;
    let mut exchange = platform.web.data_channels.open(id, None, scope()).unwrap();
    exchange
        .to_app
        .send(ToApp::Body {
            bytes: "hello".into(),
            more: false,
        })
        .await
        .unwrap();

    let (container, input) = within(polling).await.unwrap();
    assert_eq!(input.input.as_ref().unwrap().data_format(), pb::DataFormat::Cbor);
    let call: ciborium::Value = ciborium::from_reader(args_of(&input).as_ref()).unwrap();
    let args = call.as_array().unwrap()[0].as_array().unwrap();
    let seen = args[0].as_map().unwrap();
    let field = |name: &str| &seen.iter().find(|(key, _)| key.as_text() == Some(name)).unwrap().1;
    assert_eq!(field("type").as_text(), Some("http"));
    assert_eq!(field("path").as_text(), Some("/items"));
    assert_eq!(field("query_string").as_bytes().unwrap(), b"a=1");
    assert!(field("headers").is_array() && field("extensions").is_map());
    assert!(!seen.iter().any(|(key, _)| key.as_text() == Some("state")));

    let mut client = container.client.clone();
    let mut events = client
        .function_call_get_data_in(data_in(&input.function_call_id))
        .await
        .unwrap()
        .into_inner();
    let chunk = within(events.message()).await.unwrap().unwrap();
    assert_eq!((chunk.index, chunk.data_format()), (1, pb::DataFormat::Asgi));
    let Some(pb::data_chunk::DataOneof::Data(bytes)) = chunk.data_oneof else {
        panic!("no data")
    };
    let expected = asgi::HttpRequest {
        body: "hello".into(),
        more_body: false,
    };
    assert_eq!(
        pb::Asgi::decode(bytes).unwrap().r#type,
        Some(Type::HttpRequest(expected))
    );

    let start = asgi::HttpResponseStart {
        status: 201,
        headers: vec!["x-a".into(), "1".into()],
        trailers: false,
    };
    let call_id = &input.function_call_id;
    client
        .function_call_put_data_out(out(call_id, 1, Type::HttpResponseStart(start.clone())))
        .await
        .unwrap();
    client
        .function_call_put_data_out(out(call_id, 1, Type::HttpResponseStart(start)))
        .await
        .unwrap();
    let body = asgi::HttpResponseBody {
        body: "made".into(),
        more_body: false,
    };
    client
        .function_call_put_data_out(out(call_id, 2, Type::HttpResponseBody(body)))
        .await
        .unwrap();
    container.succeed(&input, b"").await;

    let expected = FromApp::ResponseStart {
        status: 201,
        headers: vec![("x-a".into(), "1".into())],
        trailers: false,
    };
    assert_eq!(within(exchange.from_app.recv()).await, Some(expected));
    let expected = FromApp::Body {
        bytes: "made".into(),
        more: false,
    };
    assert_eq!(within(exchange.from_app.recv()).await, Some(expected));
    assert!(matches!(within(exchange.from_app.recv()).await, Some(FromApp::Finished(outcome)) if outcome.is_success()));
    assert!(
        within(events.message()).await.unwrap().is_none(),
        "the stream ends with its request"
    );
}

#[tokio::test]
async fn a_request_that_is_given_up_is_cancelled_in_its_container() {
    let mut platform = Platform::start().await;
    let container = web_container(&mut platform).await;
    let polling = tokio::spawn(async move {
        let input = container.next().await;
        (container, input)
    });
    ready(&mut platform).await;
    let id = platform.control.snapshot().borrow()[0].id;
    let exchange = platform.web.data_channels.open(id, None, scope()).unwrap();
    let (container, input) = within(polling).await.unwrap();
    let mut client = container.client.clone();
    let mut events = client
        .function_call_get_data_in(data_in(&input.function_call_id))
        .await
        .unwrap()
        .into_inner();
    drop(exchange);
    let chunk = within(events.message()).await.unwrap().unwrap();
    let Some(pb::data_chunk::DataOneof::Data(bytes)) = chunk.data_oneof else {
        panic!("no data")
    };
    assert!(matches!(
        pb::Asgi::decode(bytes).unwrap().r#type,
        Some(Type::HttpDisconnect(_))
    ));
    // It does not end before the request does: the runtime would ask again without a pause.
    assert!(tokio::time::timeout(MOMENT, events.message()).await.is_err());
    let heartbeat = client
        .container_heartbeat(pb::ContainerHeartbeatRequest::default())
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        heartbeat.cancel_input_event.unwrap().input_ids,
        std::slice::from_ref(&input.input_id)
    );
    container.succeed(&input, b"").await;
    assert!(within(events.message()).await.unwrap().is_none());
}

#[tokio::test]
async fn nonsense_from_an_app_is_refused() {
    let mut platform = Platform::start().await;
    let container = web_container(&mut platform).await;
    let polling = tokio::spawn(async move {
        let input = container.next().await;
        (container, input)
    });
    ready(&mut platform).await;
    let id = platform.control.snapshot().borrow()[0].id;
    let _exchange = platform.web.data_channels.open(id, None, scope()).unwrap();
    let (container, input) = within(polling).await.unwrap();
    let mut client = container.client.clone();
    let wrong_way = out(
        &input.function_call_id,
        1,
        Type::HttpRequest(asgi::HttpRequest::default()),
    );
    let answer = client.function_call_put_data_out(wrong_way).await;
    assert_refused(answer, Code::InvalidArgument, "not one that an app sends");
    let mut garbage = out(
        &input.function_call_id,
        1,
        Type::HttpDisconnect(asgi::HttpDisconnect {}),
    );
    garbage.data_chunks[0].data_oneof = Some(pb::data_chunk::DataOneof::Data("\u{ff}".into()));
    assert_refused(
        client.function_call_put_data_out(garbage).await,
        Code::InvalidArgument,
        "not an ASGI event",
    );
    let unknown = data_in(&ionian_domain::CallId::generate().to_string());
    assert_refused(
        client.function_call_get_data_in(unknown).await.map(|_| ()),
        Code::NotFound,
        "no input stream",
    );
}
