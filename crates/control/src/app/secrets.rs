//! Secrets: sealed at rest, opened only for the containers and builds that ask for them.

use std::collections::BTreeMap;

use ionian_domain::secret::Secret;
use ionian_domain::{AppId, EnvironmentId, ErrorKind, SecretId, Timestamp};

use super::apps::digest;
use crate::Control;
use crate::error::{Error, Result};

/// The client has the same limit.
const MAX_NAME_LENGTH: usize = 64;
/// One secret's variables, names and values together. An environment block is limited by the kernel.
const MAX_SECRET_BYTES: usize = 512 * 1024;

pub struct Secrets<'a>(pub(crate) &'a Control);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SecretCreation {
    /// Refuse if the name is taken.
    FailIfExists,
    /// Replace the values of an existing one.
    Overwrite,
    /// Keep an existing one as it is.
    IfMissing,
}

impl Secrets<'_> {
    /// A named secret that has all of these keys.
    pub async fn get(&self, environment: &str, name: &str, required_keys: &[String]) -> Result<Secret> {
        let environment = self.0.environments().get(environment).await?;
        let secret = self.0.store().secrets().find_by_name(environment.id, name).await?.ok_or_else(|| {
            Error::not_found(format!(
                "Secret '{name}' not found in environment '{}'; create it with `modal secret create {name} KEY=value`",
                environment.name
            ))
        })?;
        let missing: Vec<&str> = required_keys
            .iter()
            .filter(|key| !secret.keys.contains(key))
            .map(String::as_str)
            .collect();
        if missing.is_empty() {
            Ok(secret)
        } else {
            Err(Error::not_found(format!(
                "Secret '{name}' is missing the required key(s) {}; add them with `modal secret create --force {name} …`",
                missing.join(", ")
            )))
        }
    }

    pub async fn get_by_id(&self, id: SecretId) -> Result<Secret> {
        let found = self.0.store().secrets().find(id).await?;
        found.ok_or_else(|| Error::not_found(format!("secret {id} does not exist; it was deleted")))
    }

    /// `dedupe` names the request: a repeated one finds what the first one made.
    pub async fn create(
        &self,
        environment: &str,
        name: &str,
        values: BTreeMap<String, String>,
        creation: SecretCreation,
        dedupe: Option<&str>,
    ) -> Result<Secret> {
        check_name(name)?;
        check_values(&values)?;
        let environment = self.0.environments().get(environment).await?;
        let now = Timestamp::now();
        let id = dedupe.map_or_else(SecretId::generate, |key| SecretId::from_digest(&digest("secret", key)));
        if let Some(existing) = self.0.store().secrets().find_by_name(environment.id, name).await? {
            return match creation {
                SecretCreation::FailIfExists if existing.id != id => Err(Error::new(
                    ErrorKind::AlreadyExists,
                    format!("Secret '{name}' already exists; pass --force to overwrite it"),
                )),
                SecretCreation::FailIfExists | SecretCreation::IfMissing => Ok(existing),
                SecretCreation::Overwrite => {
                    let keys: Vec<String> = values.keys().cloned().collect();
                    let sealed = self.0.sealer().seal(existing.id, &values);
                    self.0
                        .store()
                        .secrets()
                        .update_sealed(existing.id, &keys, &sealed, now)
                        .await?;
                    Ok(Secret {
                        keys,
                        sealed,
                        updated_at: now,
                        ..existing
                    })
                }
            };
        }
        let secret = self.sealed(id, environment.id, Some(name.to_owned()), None, &values);
        self.0.store().secrets().insert(&secret).await?;
        Ok(secret)
    }

    /// `Secret.from_dict` and `env=`: has no name. Equal values in an environment are one secret, so that
    /// an image or a function that asks for them stays the same image or function with every deploy.
    pub async fn create_anonymous(
        &self,
        environment: &str,
        app_id: Option<AppId>,
        values: BTreeMap<String, String>,
    ) -> Result<Secret> {
        check_values(&values)?;
        let environment_id = match app_id {
            Some(app_id) => self.0.apps().get(app_id).await?.environment_id,
            None => self.0.environments().get(environment).await?.id,
        };
        let id = self.0.sealer().name(&environment_id.to_string(), &values);
        if let Some(existing) = self.0.store().secrets().find(id).await? {
            return Ok(existing);
        }
        let secret = self.sealed(id, environment_id, None, app_id, &values);
        match self.0.store().secrets().insert(&secret).await {
            Ok(()) => Ok(secret),
            // Several functions of a deploy ask for the same values at once.
            Err(error) if error.kind() == ErrorKind::AlreadyExists => self.get_by_id(id).await,
            Err(error) => Err(error.into()),
        }
    }

    fn sealed(
        &self,
        id: SecretId,
        environment_id: EnvironmentId,
        name: Option<String>,
        app_id: Option<AppId>,
        values: &BTreeMap<String, String>,
    ) -> Secret {
        let now = Timestamp::now();
        Secret {
            id,
            environment_id,
            name,
            app_id,
            keys: values.keys().cloned().collect(),
            sealed: self.0.sealer().seal(id, values),
            created_at: now,
            updated_at: now,
            last_used_at: None,
        }
    }

    pub async fn list(&self, environment: &str, created_before: Option<Timestamp>, limit: u32) -> Result<Vec<Secret>> {
        let environment = self.0.environments().get(environment).await?;
        Ok(self
            .0
            .store()
            .secrets()
            .list(environment.id, created_before.unwrap_or(Timestamp(i64::MAX)), limit)
            .await?)
    }

    /// `is_retry` says that the first try may have deleted it.
    pub async fn delete(&self, id: SecretId, is_retry: bool) -> Result<()> {
        if self.0.store().secrets().delete(id).await? || is_retry {
            return Ok(());
        }
        Err(Error::not_found(format!("secret {id} does not exist")))
    }

    /// Records that containers start with these secrets.
    pub(crate) async fn touch(&self, ids: &[SecretId]) -> Result<()> {
        Ok(self.0.store().secrets().touch(ids, Timestamp::now()).await?)
    }

    /// The variables of these secrets in order: what comes later wins.
    pub(crate) async fn open(&self, ids: &[SecretId]) -> Result<Vec<(String, String)>> {
        let mut variables = Vec::new();
        for id in ids {
            let secret = self.get_by_id(*id).await?;
            let values = self
                .0
                .sealer()
                .open(secret.id, &secret.sealed)
                .map_err(|source| Error::internal(format!("the server cannot open secret {id}"), source))?;
            variables.extend(values);
        }
        Ok(variables)
    }
}

fn check_name(name: &str) -> Result<()> {
    let is_valid = !name.is_empty()
        && name.len() <= MAX_NAME_LENGTH
        && name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'));
    if is_valid {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "'{}' is not a valid name for a secret: use up to {MAX_NAME_LENGTH} letters, digits, '-', '_' and '.'",
        name.chars().take(80).collect::<String>().escape_debug()
    )))
}

fn check_values(values: &BTreeMap<String, String>) -> Result<()> {
    let size: usize = values.iter().map(|(key, value)| key.len() + value.len() + 2).sum();
    if size > MAX_SECRET_BYTES {
        return Err(Error::invalid(format!(
            "the secret has {size} bytes; at most {MAX_SECRET_BYTES} fit in a process environment"
        )));
    }
    for (key, value) in values {
        if key.is_empty() || key.contains(['=', '\0']) || value.contains('\0') {
            return Err(Error::invalid(format!(
                "'{}' cannot be an environment variable: names are not empty and have no '=', and neither names nor \
                 values have NUL characters",
                key.escape_default()
            )));
        }
    }
    Ok(())
}
