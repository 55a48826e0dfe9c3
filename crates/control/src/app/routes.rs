//! Web URLs: labels of endpoints, and the route table that the ingress reads.

use std::collections::HashMap;
use std::sync::Arc;

use ionian_domain::AppId;
use ionian_domain::app::{App, AppState};
use ionian_domain::environment::Environment;
use ionian_domain::function::Function;
use ionian_domain::web::{Route, WebSpec};
use sha2::{Digest, Sha256};

use crate::Control;
use crate::error::Result;
use crate::web::RouteTable;

/// The limit of one DNS label.
const MAX_LABEL: usize = 63;
/// Characters of the hash that ends a label which was cut.
const HASH_LENGTH: usize = 7;

/// A label part: lower case, `_` and everything else that DNS does not take becomes `-`.
pub fn slug(text: &str) -> String {
    let mut slug: String = text
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() {
                c.to_ascii_lowercase()
            } else {
                '-'
            }
        })
        .collect();
    while slug.ends_with('-') {
        slug.pop();
    }
    slug.trim_start_matches('-').to_owned()
}

/// `<workspace>[-<suffix>]--<label>`, cut to what DNS takes. Returns whether it was cut.
pub fn host_label(workspace: &str, suffix: &str, label: &str) -> (String, bool) {
    let workspace = slug(workspace);
    let prefix = if suffix.is_empty() {
        workspace
    } else {
        format!("{workspace}-{suffix}")
    };
    let full = format!("{prefix}--{label}");
    if full.len() <= MAX_LABEL {
        return (full, false);
    }
    let hash = hex::encode(Sha256::digest(full.as_bytes()));
    let kept = full[..MAX_LABEL - HASH_LENGTH - 1].trim_end_matches('-');
    (format!("{kept}-{}", &hash[..HASH_LENGTH]), true)
}

/// The label of an endpoint that asked for none.
pub fn default_label(app_name: &str, function_tag: &str, method: Option<&str>) -> String {
    let function = function_tag.strip_suffix(".*").unwrap_or(function_tag);
    let parts: Vec<String> = [Some(app_name), Some(function), method]
        .into_iter()
        .flatten()
        .map(slug)
        .filter(|part| !part.is_empty())
        .collect();
    parts.join("-")
}

/// What ephemeral apps' labels end in, so that `modal serve` never takes over a deployed URL.
pub fn dev_suffix(state: AppState, wanted: &str) -> String {
    match state {
        AppState::Ephemeral | AppState::Detached => {
            let suffix = slug(wanted);
            if suffix.is_empty() {
                "-dev".to_owned()
            } else {
                format!("-{suffix}")
            }
        }
        AppState::Initializing | AppState::Deployed | AppState::Stopping | AppState::Stopped => String::new(),
    }
}

impl Control {
    pub fn host_label_of(&self, environment: &Environment, web: &WebSpec) -> (String, bool) {
        host_label(&self.config().workspace, &environment.web_suffix, &web.label)
    }

    pub fn web_url_of(&self, environment: &Environment, web: &WebSpec) -> String {
        self.config().web_url(&self.host_label_of(environment, web).0)
    }

    /// The app that a web URL leads to now.
    pub fn web_label_holder(&self, environment: &Environment, web: &WebSpec) -> Option<AppId> {
        let (label, _) = self.host_label_of(environment, web);
        self.routes()
            .borrow()
            .by_host_label
            .get(&label)
            .map(|route| route.app_id)
    }

    /// Reads all live apps and publishes the table anew. Called when an app was published or stopped.
    pub(crate) async fn republish_routes(&self) -> Result<()> {
        // One at a time, so that an older read never replaces a newer one.
        let _turn = self.routes_turn().lock().await;
        let environments = self.store().environments().list().await?;
        let mut by_host_label: HashMap<String, Arc<Route>> = HashMap::new();
        for app in self.store().apps().list_all_live().await? {
            if app.version == 0 {
                continue;
            }
            let Some(environment) = environments.iter().find(|e| e.id == app.environment_id) else {
                continue;
            };
            for function in self.published_functions(&app).await? {
                for route in self.routes_of(&app, environment, &function) {
                    by_host_label.insert(route.host_label.clone(), Arc::new(route));
                }
            }
        }
        self.routes().send_replace(Arc::new(RouteTable { by_host_label }));
        Ok(())
    }

    fn routes_of(&self, app: &App, environment: &Environment, function: &Function) -> Vec<Route> {
        let spec = &function.spec;
        let methods = spec.web_methods.iter().map(|(method, web)| (Some(method.clone()), web));
        spec.web
            .iter()
            .map(|web| (None, web))
            .chain(methods)
            .map(|(method, web)| Route {
                host_label: self.host_label_of(environment, web).0,
                app_id: app.id,
                app_name: app.name.clone().unwrap_or_else(|| app.description.clone()),
                function_id: function.id,
                function_name: spec.name.clone(),
                method,
                kind: web.kind,
                slots_per_container: spec.concurrency.max_inputs.max(1),
                timeout: spec.timeout,
                startup_timeout: spec.startup_timeout.max(web.startup_timeout),
                requires_proxy_auth: web.requires_proxy_auth,
            })
            .collect()
    }

    /// The functions of an app at the definitions that were last published.
    pub(crate) async fn published_functions(&self, app: &App) -> Result<Vec<Function>> {
        let mut functions = Vec::new();
        for function_id in app.layout.functions.values() {
            if let Some(function) = self.store().functions().find_published(*function_id).await? {
                functions.push(function);
            }
        }
        Ok(functions)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_follow_app_and_function() {
        assert_eq!(
            default_label("fastapi-on-modal", "fastapi_app", None),
            "fastapi-on-modal-fastapi-app"
        );
        assert_eq!(
            default_label("My App", "Model.*", Some("predict_now")),
            "my-app-model-predict-now"
        );
    }

    #[test]
    fn long_labels_are_cut_and_stay_distinct() {
        let (a, cut_a) = host_label("w", "", &"x".repeat(80));
        let (b, cut_b) = host_label("w", "", &format!("{}y", "x".repeat(80)));
        assert!(cut_a && cut_b);
        assert_eq!(a.len(), 63);
        assert_ne!(a, b);
        assert_eq!(host_label("ionian", "", "a-b"), ("ionian--a-b".to_owned(), false));
        assert_eq!(host_label("ionian", "prod", "a").0, "ionian-prod--a");
    }
}
