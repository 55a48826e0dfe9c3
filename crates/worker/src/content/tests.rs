//! The cache against a server of a few lines, over real sockets.

use std::sync::atomic::AtomicUsize;

use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::TcpListener;

use super::*;

fn digest(text: &str) -> String {
    hex::encode(Sha256::digest(text.as_bytes()))
}

/// Answers `GET …/<digest of text>` with the text to those who know the secret. The first answers are damaged.
async fn server(texts: &'static [&'static str], damaged: usize) -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let served = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&served);
    tokio::spawn(async move {
        while let Ok((connection, _)) = listener.accept().await {
            let count = Arc::clone(&count);
            tokio::spawn(async move {
                let mut connection = BufReader::new(connection);
                let (mut head, mut line) = (String::new(), String::new());
                while connection.read_line(&mut line).await.unwrap() > 2 {
                    head.push_str(&line);
                    line.clear();
                }
                let found = texts.iter().find(|text| head.contains(&digest(text)));
                let answer = match found {
                    _ if !head.contains("Bearer secret") => "HTTP/1.1 401 No\r\ncontent-length: 0\r\n\r\n".to_owned(),
                    None => "HTTP/1.1 404 No\r\ncontent-length: 0\r\n\r\n".to_owned(),
                    Some(text) => {
                        let is_damaged = count.fetch_add(1, Ordering::Relaxed) < damaged;
                        let body = if is_damaged {
                            "x".repeat(text.len())
                        } else {
                            (*text).to_owned()
                        };
                        format!(
                            "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
                            body.len()
                        )
                    }
                };
                connection.write_all(answer.as_bytes()).await.unwrap();
                connection.shutdown().await.unwrap();
            });
        }
    });
    (url, served)
}

#[tokio::test]
async fn content_is_fetched_once_and_checked() {
    let (url, served) = server(&["one", "two"], 1).await;
    let dir = tempfile::tempdir().unwrap();
    let cache = ContentCache::open(dir.path().join("c"), 1000, &url, "secret").unwrap();
    assert!((cache.files())(&digest("one")).is_err());
    cache
        .fetch(vec![digest("one"), digest("two"), digest("one")])
        .await
        .unwrap();
    assert_eq!(served.load(Ordering::Relaxed), 3, "the damaged one was fetched again");
    let path = (cache.files())(&digest("one")).unwrap();
    assert_eq!(fs::read_to_string(path).unwrap(), "one");
    // Also by the next process.
    let cache = ContentCache::open(dir.path().join("c"), 1000, &url, "secret").unwrap();
    cache.fetch(vec![digest("two")]).await.unwrap();
    assert_eq!(served.load(Ordering::Relaxed), 3);
    // After another boot nothing is trusted.
    fs::write(dir.path().join("c").join(BOOT_ID_FILE), "another").unwrap();
    let cache = ContentCache::open(dir.path().join("c"), 1000, &url, "secret").unwrap();
    assert!((cache.files())(&digest("two")).is_err());
}

#[tokio::test]
async fn what_cannot_be_had_is_said() {
    let (url, _) = server(&["one"], 0).await;
    let dir = tempfile::tempdir().unwrap();
    let cache = ContentCache::open(dir.path().join("c"), 1000, &url, "secret").unwrap();
    let missing = cache.fetch(vec![digest("gone")]).await.unwrap_err();
    assert!(matches!(missing, ContentError::Missing { .. }), "{missing}");
    let odd = cache.fetch(vec!["../../etc/passwd".to_owned()]).await.unwrap_err();
    assert!(matches!(odd, ContentError::Digest { .. }), "{odd}");
    let stranger = ContentCache::open(dir.path().join("d"), 1000, &url, "guess").unwrap();
    let refused = stranger.fetch(vec![digest("one")]).await.unwrap_err();
    assert!(matches!(refused, ContentError::Refused { .. }), "{refused}");
}

#[tokio::test]
async fn the_longest_unused_goes_first_and_what_is_in_use_stays() {
    let (url, _) = server(&["aaaaa", "bbbbb", "ccccc"], 0).await;
    let dir = tempfile::tempdir().unwrap();
    let cache = ContentCache::open(dir.path().to_owned(), 12, &url, "secret").unwrap();
    cache.fetch(vec![digest("aaaaa"), digest("bbbbb")]).await.unwrap();
    let full = cache.fetch(vec![digest("ccccc")]).await.unwrap_err();
    assert!(matches!(full, ContentError::Full { needed: 5, limit: 12 }), "{full}");
    let long_ago = SystemTime::now() - IN_USE * 2;
    fs::File::open(dir.path().join(digest("bbbbb")))
        .unwrap()
        .set_modified(long_ago)
        .unwrap();
    cache.fetch(vec![digest("ccccc")]).await.unwrap();
    assert!((cache.files())(&digest("aaaaa")).is_ok());
    assert!((cache.files())(&digest("bbbbb")).is_err());
}
