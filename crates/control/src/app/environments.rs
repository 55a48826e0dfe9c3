//! Environments. There is always a default one.

use ionian_domain::environment::Environment;
use ionian_domain::{EnvironmentId, ErrorKind, Timestamp};

use super::apps::digest;
use crate::Control;
use crate::error::{Error, Result};

/// The environment that exists from the first start.
pub const DEFAULT_NAME: &str = "main";

/// The client has the same limit for object names.
const MAX_NAME_LENGTH: usize = 64;

pub struct Environments<'a>(pub(crate) &'a Control);

impl Environments<'_> {
    /// The environment of this name; the default one for the empty name.
    pub async fn get(&self, name: &str) -> Result<Environment> {
        let found = if name.is_empty() {
            self.0.store().environments().find_default().await?
        } else {
            self.0.store().environments().find_by_name(name).await?
        };
        found.ok_or_else(|| {
            Error::not_found(format!(
                "environment '{name}' does not exist; create it with `modal environment create`"
            ))
        })
    }

    pub async fn get_by_id(&self, id: EnvironmentId) -> Result<Environment> {
        let found = self.0.store().environments().find(id).await?;
        found.ok_or_else(|| Error::not_found(format!("environment {id} does not exist")))
    }

    pub async fn list(&self) -> Result<Vec<Environment>> {
        Ok(self.0.store().environments().list().await?)
    }

    /// `dedupe` names the request: a repeated one finds what the first one made.
    pub async fn create(&self, name: &str, dedupe: Option<&str>) -> Result<Environment> {
        let valid = name.len() <= MAX_NAME_LENGTH
            && name.starts_with(|c: char| c.is_ascii_alphanumeric())
            && name
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'));
        if !valid {
            return Err(Error::invalid(format!(
                "'{}' is not a valid environment name: use up to {MAX_NAME_LENGTH} letters, digits, '-', '_' and '.', \
                 and begin with a letter or digit",
                name.chars().take(80).collect::<String>().escape_debug()
            )));
        }
        let id = dedupe.map_or_else(EnvironmentId::generate, |key| {
            EnvironmentId::from_digest(&digest("environment", key))
        });
        let environments = self.0.store().environments().list().await?;
        if let Some(existing) = environments.iter().find(|existing| existing.name == name) {
            return if existing.id == id {
                Ok(existing.clone())
            } else {
                Err(Error::new(
                    ErrorKind::AlreadyExists,
                    format!("environment '{name}' exists already"),
                ))
            };
        }
        let environment = Environment {
            id,
            name: name.to_owned(),
            web_suffix: web_suffix(name, &environments),
            is_default: false,
            created_at: Timestamp::now(),
        };
        self.0.store().environments().insert(&environment).await?;
        Ok(environment)
    }
}

/// What keeps an environment's web URLs apart from those of others: its name, as far as a URL can say it.
/// Names that differ only in what a URL cannot say get a number.
fn web_suffix(name: &str, others: &[Environment]) -> String {
    let plain = super::routes::slug(name);
    let is_free = |suffix: &str| others.iter().all(|other| other.web_suffix != suffix);
    if is_free(&plain) {
        return plain;
    }
    // One of these is free: there are more of them than environments.
    let numbers = 2..others.len() + 3;
    numbers
        .map(|number| format!("{plain}-{number}"))
        .find(|suffix| is_free(suffix))
        .unwrap_or(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn environments_whose_names_look_alike_in_urls_are_kept_apart() {
        let environment = |name: &str, others: &[Environment]| Environment {
            id: EnvironmentId::generate(),
            name: name.to_owned(),
            web_suffix: web_suffix(name, others),
            is_default: false,
            created_at: Timestamp::now(),
        };
        let one = environment("my_env", &[]);
        let two = environment("my-env", std::slice::from_ref(&one));
        let three = environment("My.Env", &[one.clone(), two.clone()]);
        assert_eq!(
            [one.web_suffix, two.web_suffix, three.web_suffix],
            ["my-env", "my-env-2", "my-env-3"]
        );
    }
}
