//! `ionian token`: works on the database directly, also while a server runs on it.

use std::os::unix::fs::DirBuilderExt;

use anyhow::{Context, bail};
use ionian_api::JoinTokens;
use ionian_control::app::tokens::hash_secret;
use ionian_domain::{Timestamp, TokenId};
use ionian_store::Store;
use ionian_store::tokens::TokenRecord;

use crate::config::Config;
use crate::keys::Keys;

pub(crate) async fn open_store(config: &Config) -> anyhow::Result<Store> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&config.data_dir)
        .with_context(|| format!("cannot create {}", config.data_dir.display()))?;
    Store::open(&config.database())
        .await
        .with_context(|| format!("cannot open {}", config.database().display()))
}

#[expect(clippy::print_stdout, reason = "the output of a command")]
pub(crate) async fn new(config: &Config, name: &str) -> anyhow::Result<()> {
    if name.len() > 100 || name.contains(['\n', '\0']) {
        bail!("a token's name has at most 100 characters on one line");
    }
    let store = open_store(config).await?;
    let id = TokenId::generate();
    let secret = format!("as-{}", hex::encode(rand::random::<[u8; 32]>()));
    let record = TokenRecord {
        id,
        name: name.to_owned(),
        secret_hash: hash_secret(&secret),
        created_at: Timestamp::now(),
        revoked_at: None,
        last_used_at: None,
    };
    store.tokens().insert(&record).await?;
    store.close().await;
    let url = match std::fs::read_to_string(config.url_file()) {
        Ok(url) => url.trim().to_owned(),
        // No server has run here yet: this is where one will be.
        Err(_) => config
            .listen
            .first()
            .map_or_else(String::new, |address| format!("http://{address}")),
    };
    println!("export MODAL_SERVER_URL={url}");
    println!("export MODAL_TOKEN_ID={id}");
    println!("export MODAL_TOKEN_SECRET={secret}");
    Ok(())
}

/// A token by which `ionian worker` joins this server. Signed, not stored.
#[expect(clippy::print_stdout, reason = "the output of a command")]
pub(crate) async fn new_worker(config: &Config) -> anyhow::Result<()> {
    // Makes the data directory where there is none.
    open_store(config).await?.close().await;
    let keys = Keys::load(&config.data_dir)?;
    println!("{}", JoinTokens::new(keys.workers).issue());
    Ok(())
}

#[expect(clippy::print_stdout, reason = "the output of a command")]
pub(crate) async fn list(config: &Config) -> anyhow::Result<()> {
    let store = open_store(config).await?;
    for token in store.tokens().list().await? {
        let state = if token.revoked_at.is_some() {
            "revoked"
        } else {
            "active"
        };
        println!("{}  {state:<8}  {}", token.id, token.name);
    }
    store.close().await;
    Ok(())
}

#[expect(clippy::print_stdout, reason = "the output of a command")]
pub(crate) async fn revoke(config: &Config, id: &str) -> anyhow::Result<()> {
    let id: TokenId = id.parse()?;
    let store = open_store(config).await?;
    if store.tokens().find(id).await?.is_none() {
        bail!("token {id} does not exist; `ionian token list` shows all");
    }
    store.tokens().revoke(id, Timestamp::now()).await?;
    store.close().await;
    // A server that runs may have read it right before; said is only what holds there, too.
    tokio::time::sleep(ionian_store::TOKEN_LIFETIME).await;
    println!("token {id} is revoked");
    Ok(())
}
