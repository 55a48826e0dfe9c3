//! Reads configuration: defaults, then a file, then the environment, then the command line. Nobody else
//! in the process reads any.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use ionian_container::UserNamespaces;
use ionian_container::config::AddressPool;
use ionian_domain::container::RuntimeKind;
use ionian_image::base::BaseSource;

use crate::settings::{Addresses, SETTINGS};

const DEFAULT_PORT: u16 = 8800;

#[derive(Debug, Clone)]
pub(crate) struct Config {
    pub listen: Addresses,
    pub workspace: String,
    pub base_domain: String,
    /// Scheme and port by which the world reaches us, where that is not the listener.
    pub public: Option<(String, u16)>,
    pub data_dir: PathBuf,
    pub log: String,
    pub images_dir: Option<PathBuf>,
    pub builder_version: String,
    pub image_sources: Vec<BaseSource>,
    pub insecure_registries: Vec<String>,
    pub layouts_dir: Option<PathBuf>,
    pub debian_mirror: Option<String>,
    pub runtime: RuntimeKind,
    pub allow_weaker_runtime: bool,
    /// Where it is not `runtime`.
    pub build_runtime: Option<RuntimeKind>,
    pub runsc: Option<PathBuf>,
    pub address_pool: AddressPool,
    pub user_namespaces: UserNamespaces,
    pub process_python: Option<PathBuf>,
    pub cpu_millis: u32,
    pub memory_mib: u32,
    pub embedded_worker: bool,
    pub content_cache_gib: u32,
    pub web_hook: bool,
    pub scaledown_window: Duration,
    pub ca_bundle: String,
    pub trust_env: Vec<(String, String)>,
    pub journal: Option<PathBuf>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: both_loopbacks(DEFAULT_PORT),
            workspace: "ionian".to_owned(),
            base_domain: "localhost".to_owned(),
            public: None,
            data_dir: default_data_dir(),
            log: "info".to_owned(),
            images_dir: None,
            builder_version: "2025.06".to_owned(),
            image_sources: vec![BaseSource::Registry, BaseSource::Layouts, BaseSource::Bootstrap],
            insecure_registries: Vec::new(),
            layouts_dir: None,
            debian_mirror: None,
            runtime: RuntimeKind::Runc,
            allow_weaker_runtime: false,
            build_runtime: None,
            runsc: None,
            address_pool: AddressPool::default(),
            user_namespaces: UserNamespaces::default(),
            process_python: None,
            cpu_millis: 0,
            memory_mib: 0,
            embedded_worker: true,
            content_cache_gib: 20,
            web_hook: true,
            scaledown_window: Duration::from_mins(1),
            ca_bundle: "auto".to_owned(),
            trust_env: Vec::new(),
            journal: None,
        }
    }
}

fn default_data_dir() -> PathBuf {
    if nix::unistd::geteuid().is_root() {
        return PathBuf::from("/var/lib/ionian");
    }
    match std::env::var_os("HOME") {
        Some(home) => Path::new(&home).join(".local/share/ionian"),
        None => PathBuf::from("ionian-data"),
    }
}

fn both_loopbacks(port: u16) -> Addresses {
    vec![
        SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port),
        SocketAddr::new(IpAddr::V6(Ipv6Addr::LOCALHOST), port),
    ]
}

/// One address; a loopback one stands for both, since `*.localhost` resolves to either.
pub(crate) fn parse_listen(text: &str) -> Result<Addresses, String> {
    let text = text.replace("localhost:", "127.0.0.1:");
    let address: SocketAddr = text
        .parse()
        .map_err(|_| format!("'{text}' is not an address and port, as in 127.0.0.1:8800"))?;
    Ok(if address.ip().is_loopback() {
        both_loopbacks(address.port())
    } else {
        vec![address]
    })
}

impl Config {
    /// All mistakes are reported at once.
    pub(crate) fn load(file: Option<&Path>, data_dir: Option<&Path>) -> anyhow::Result<Self> {
        let mut config = Self::default();
        let mut mistakes = Vec::new();
        if let Some(path) = file {
            let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
            apply_file(&mut config, &text, &mut mistakes);
        }
        for setting in SETTINGS {
            let variable = setting.variable();
            if let Ok(text) = std::env::var(&variable)
                && let Err(reason) = (setting.apply)(&mut config, &text)
            {
                mistakes.push(format!("{variable}: {reason}"));
            }
        }
        if let Some(dir) = data_dir {
            dir.clone_into(&mut config.data_dir);
        }
        if !mistakes.is_empty() {
            bail!(
                "the configuration has {} mistake(s):\n  {}",
                mistakes.len(),
                mistakes.join("\n  ")
            );
        }
        config.data_dir = std::path::absolute(&config.data_dir)?;
        Ok(config)
    }

    pub(crate) fn images_dir(&self) -> PathBuf {
        self.images_dir.clone().unwrap_or_else(|| self.data_dir.join("images"))
    }

    pub(crate) fn database(&self) -> PathBuf {
        self.data_dir.join("ionian.db")
    }

    /// Where a running server says how it is reached.
    pub(crate) fn url_file(&self) -> PathBuf {
        self.data_dir.join("server-url")
    }

    /// Names what belongs to this server on its host. It follows from the data directory, so that `reap`
    /// works when the directory is gone.
    pub(crate) fn instance_id(&self) -> String {
        self.data_dir.display().to_string()
    }
}

fn apply_file(config: &mut Config, text: &str, mistakes: &mut Vec<String>) {
    let table: toml::Table = match text.parse() {
        Ok(table) => table,
        Err(error) => {
            mistakes.push(error.to_string());
            return;
        }
    };
    for (section, value) in &table {
        let toml::Value::Table(keys) = value else {
            mistakes.push(format!("'{section}' is not a section; settings stand under [section]"));
            continue;
        };
        for (key, value) in keys {
            let known = SETTINGS
                .iter()
                .find(|setting| setting.section == section && setting.key == key);
            let Some(setting) = known else {
                mistakes.push(format!("[{section}] has no setting '{key}'; `ionian config` lists all"));
                continue;
            };
            match text_of(value).and_then(|text| (setting.apply)(config, &text)) {
                Ok(()) => {}
                Err(reason) => mistakes.push(format!("[{section}] {key}: {reason}")),
            }
        }
    }
}

/// The text form of a value, as the environment has it.
fn text_of(value: &toml::Value) -> Result<String, String> {
    Ok(match value {
        toml::Value::String(text) => text.clone(),
        toml::Value::Integer(number) => number.to_string(),
        toml::Value::Boolean(flag) => flag.to_string(),
        toml::Value::Array(items) => items.iter().map(text_of).collect::<Result<Vec<_>, _>>()?.join(","),
        toml::Value::Float(_) | toml::Value::Datetime(_) | toml::Value::Table(_) => {
            return Err("a text, a whole number, true, false or a list of texts is wanted".to_owned());
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::Setting;

    #[test]
    fn all_mistakes_are_reported_at_once() {
        let mut config = Config::default();
        let mut mistakes = Vec::new();
        let text = "[server]\nlisten = \"nonsense\"\nworkspacee = \"x\"\n[runtime]\nkind = \"docker\"\n[nope]\na = 1\n";
        apply_file(&mut config, text, &mut mistakes);
        assert_eq!(mistakes.len(), 4, "{mistakes:#?}");
    }

    #[test]
    fn every_default_in_the_documentation_is_the_default() {
        let mut documented = Config::default();
        for setting in SETTINGS {
            let value: toml::Table = format!("x = {}", setting.default).parse().expect("the default is TOML");
            let text = text_of(&value["x"]).unwrap();
            (setting.apply)(&mut documented, &text)
                .unwrap_or_else(|e| panic!("{}.{}: {e}", setting.section, setting.key));
        }
        assert_eq!(format!("{documented:?}"), format!("{:?}", Config::default()));
    }

    #[test]
    fn a_file_that_nests_for_ever_is_a_mistake() {
        let mut mistakes = Vec::new();
        let text = format!("[server]\nlisten = {}", "[".repeat(100_000));
        apply_file(&mut Config::default(), &text, &mut mistakes);
        assert_eq!(mistakes.len(), 1);
    }

    proptest::proptest! {
        /// Whatever an operator's file holds, it is read or its mistakes are told.
        #[test]
        fn no_file_is_too_strange(at in 0..SETTINGS.len(), value in "\\PC{0,40}", rest in "(?s).{0,80}") {
            let Setting { section, key, .. } = SETTINGS[at];
            for text in [format!("[{section}]\n{key} = {value}\n{rest}"), format!("[{section}]\n{key} = {value:?}")] {
                apply_file(&mut Config::default(), &text, &mut Vec::new());
            }
            let _mistake = (SETTINGS[at].apply)(&mut Config::default(), &value);
        }
    }

    #[test]
    fn a_loopback_address_stands_for_both() {
        assert_eq!(parse_listen("127.0.0.1:0").unwrap().len(), 2);
        assert_eq!(parse_listen("0.0.0.0:80").unwrap().len(), 1);
        assert!(parse_listen("8800").is_err());
    }
}
