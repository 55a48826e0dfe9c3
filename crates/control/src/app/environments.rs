//! Environments. There is always a default one.

use ionian_domain::environment::Environment;
use ionian_domain::{EnvironmentId, Timestamp};

use crate::error::{Error, Result};
use crate::Control;

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
            Error::not_found(format!("environment '{name}' does not exist; create it with `modal environment create`"))
        })
    }

    pub async fn get_by_id(&self, id: EnvironmentId) -> Result<Environment> {
        let found = self.0.store().environments().find(id).await?;
        found.ok_or_else(|| Error::not_found(format!("environment {id} does not exist")))
    }

    pub async fn list(&self) -> Result<Vec<Environment>> {
        Ok(self.0.store().environments().list().await?)
    }

    pub async fn create(&self, name: &str) -> Result<Environment> {
        let valid = !name.is_empty()
            && name.len() <= MAX_NAME_LENGTH
            && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'));
        if !valid {
            return Err(Error::invalid(format!(
                "'{name}' is not a valid environment name: use up to {MAX_NAME_LENGTH} letters, digits, '-', '_' and '.'"
            )));
        }
        if self.0.store().environments().find_by_name(name).await?.is_some() {
            return Err(Error::new(
                ionian_domain::ErrorKind::AlreadyExists,
                format!("environment '{name}' exists already"),
            ));
        }
        let environment = Environment {
            id: EnvironmentId::generate(),
            name: name.to_owned(),
            web_suffix: super::routes::slug(name),
            is_default: false,
            created_at: Timestamp::now(),
        };
        self.0.store().environments().insert(&environment).await?;
        Ok(environment)
    }
}
