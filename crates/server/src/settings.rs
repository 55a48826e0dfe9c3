//! The table of every setting: its name, its default, what it means and how it is read.
//!
//! A setting has one text form, used by the environment (`IONIAN_<SECTION>_<KEY>`) and by the file
//! alike, so that both are checked by the same code and all mistakes can be reported together.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use ionian_domain::container::RuntimeKind;
use ionian_image::base::BaseSource;

use crate::config::{Config, parse_listen};

/// Reads one value into the configuration, or says what is wrong with it.
type Apply = fn(&mut Config, &str) -> Result<(), String>;

pub(crate) struct Setting {
    pub section: &'static str,
    pub key: &'static str,
    /// As it stands in a TOML file.
    pub default: &'static str,
    pub meaning: &'static str,
    pub apply: Apply,
}

impl Setting {
    pub(crate) fn variable(&self) -> String {
        format!("IONIAN_{}_{}", self.section, self.key).to_uppercase()
    }
}

const fn setting(
    section: &'static str,
    key: &'static str,
    default: &'static str,
    meaning: &'static str,
    apply: Apply,
) -> Setting {
    Setting {
        section,
        key,
        default,
        meaning,
        apply,
    }
}

pub(crate) const SETTINGS: &[Setting] = &[
    setting(
        "server",
        "listen",
        "\"127.0.0.1:8800\"",
        "Address and port of the one listener. A loopback address stands for both, IPv4 and IPv6.",
        |config, text| {
            config.listen = parse_listen(text)?;
            Ok(())
        },
    ),
    setting(
        "server",
        "workspace",
        "\"ionian\"",
        "The first part of every web URL.",
        |config, text| {
            let valid = !text.is_empty()
                && text.len() <= 30
                && text
                    .chars()
                    .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
                && !text.contains("--");
            if !valid {
                return Err("use up to 30 lower-case letters, digits and single dashes".to_owned());
            }
            text.clone_into(&mut config.workspace);
            Ok(())
        },
    ),
    setting(
        "server",
        "base_domain",
        "\"localhost\"",
        "The domain under which web endpoints live; its sub-domains must resolve to this machine.",
        |config, text| {
            if text.is_empty() || text.starts_with('.') || text.contains([':', '/', ' ']) {
                return Err("this is not a domain name".to_owned());
            }
            config.base_domain = text.to_ascii_lowercase();
            Ok(())
        },
    ),
    setting(
        "server",
        "public_url",
        "\"\"",
        "How the world reaches the listener, as in https://ionian.example.com; empty for the listener's own address.",
        |config, text| {
            config.public = if text.is_empty() {
                None
            } else {
                Some(parse_public_url(text)?)
            };
            Ok(())
        },
    ),
    setting(
        "data",
        "dir",
        "\"\"",
        "Where the platform keeps its data; empty for /var/lib/ionian (root) or ~/.local/share/ionian.",
        |config, text| {
            if !text.is_empty() {
                config.data_dir = PathBuf::from(text);
            }
            Ok(())
        },
    ),
    setting(
        "log",
        "filter",
        "\"info\"",
        "What is logged to stderr, in tracing's filter syntax.",
        |config, text| {
            text.clone_into(&mut config.log);
            Ok(())
        },
    ),
    setting(
        "images",
        "dir",
        "\"\"",
        "Where layers of images lie; empty for a folder of the data directory. Servers on one machine may share it.",
        |config, text| {
            config.images_dir = (!text.is_empty()).then(|| PathBuf::from(text));
            Ok(())
        },
    ),
    setting(
        "images",
        "builder_version",
        "\"2025.06\"",
        "The image builder version of clients that ask for none: 2024.10 or 2025.06.",
        |config, text| {
            if !["2024.10", "2025.06"].contains(&text) {
                return Err("the versions are 2024.10 and 2025.06".to_owned());
            }
            text.clone_into(&mut config.builder_version);
            Ok(())
        },
    ),
    setting(
        "images",
        "sources",
        "[\"registry\", \"layouts\", \"bootstrap\"]",
        "Where base images come from, in this order: an OCI registry, OCI layouts on disk, or made here from a Debian mirror.",
        |config, text| {
            config.image_sources = list(text)
                .iter()
                .map(|source| match source.as_str() {
                    "registry" => Ok(BaseSource::Registry),
                    "layouts" => Ok(BaseSource::Layouts),
                    "bootstrap" => Ok(BaseSource::Bootstrap),
                    unknown => Err(format!("'{unknown}' is none of registry, layouts and bootstrap")),
                })
                .collect::<Result<_, _>>()?;
            Ok(())
        },
    ),
    setting(
        "images",
        "insecure_registries",
        "[]",
        "Registries (host:port) that are spoken to by plain HTTP.",
        |config, text| {
            config.insecure_registries = list(text);
            Ok(())
        },
    ),
    setting(
        "images",
        "layouts_dir",
        "\"\"",
        "Where OCI layouts and archives lie.",
        |config, text| {
            config.layouts_dir = (!text.is_empty()).then(|| PathBuf::from(text));
            Ok(())
        },
    ),
    setting(
        "images",
        "debian_mirror",
        "\"\"",
        "The Debian mirror from which base images are made; empty for the host's own, else Debian's.",
        |config, text| {
            config.debian_mirror = (!text.is_empty()).then(|| text.to_owned());
            Ok(())
        },
    ),
    setting(
        "runtime",
        "kind",
        "\"runc\"",
        "How containers and build steps are isolated: runc, gvisor (a kernel of their own), or process (not at all).",
        |config, text| {
            config.runtime = match text {
                "runc" => RuntimeKind::Runc,
                "gvisor" => RuntimeKind::Gvisor,
                "process" => RuntimeKind::Process,
                _ => return Err("the kinds are runc, gvisor and process".to_owned()),
            };
            Ok(())
        },
    ),
    setting(
        "runtime",
        "allow_weaker",
        "false",
        "With kind gvisor: whether single functions may ask for runc. They may ask for gvisor in any case.",
        |config, text| {
            config.allow_weaker_runtime = boolean(text)?;
            Ok(())
        },
    ),
    setting(
        "runtime",
        "builds",
        "\"\"",
        "With kind gvisor: runc runs the commands of image builds faster, on the host's kernel; empty for kind.",
        |config, text| {
            config.build_runtime = match text {
                "" => None,
                "runc" => Some(RuntimeKind::Runc),
                "gvisor" => Some(RuntimeKind::Gvisor),
                _ => return Err("builds run on runc or gvisor".to_owned()),
            };
            Ok(())
        },
    ),
    setting(
        "runtime",
        "runsc",
        "\"\"",
        "gVisor's program; empty for the runsc that is in the PATH.",
        |config, text| {
            config.runsc = (!text.is_empty()).then(|| PathBuf::from(text));
            Ok(())
        },
    ),
    setting(
        "runtime",
        "address_pool",
        "\"172.29.0.0/16\"",
        "Private addresses from which the containers' network is taken.",
        |config, text| {
            config.address_pool = text.parse().map_err(|error| format!("{error}"))?;
            Ok(())
        },
    ),
    setting(
        "runtime",
        "user_namespaces",
        "\"auto\"",
        "Whether root in a container of runc is an id of its own on the host: auto (where the kernel can), require, or off.",
        |config, text| {
            config.user_namespaces = text.parse()?;
            Ok(())
        },
    ),
    setting(
        "runtime",
        "process_python",
        "\"\"",
        "For the process runtime: the interpreter that has the client and the apps' packages.",
        |config, text| {
            config.process_python = (!text.is_empty()).then(|| PathBuf::from(text));
            Ok(())
        },
    ),
    setting(
        "runtime",
        "cpu_millis",
        "0",
        "CPU that containers may ask for in total, in thousandths of a core; 0 for all of the machine.",
        |config, text| {
            config.cpu_millis = number(text)?;
            Ok(())
        },
    ),
    setting(
        "runtime",
        "memory_mib",
        "0",
        "Memory that containers may ask for in total; 0 for three quarters of the machine's.",
        |config, text| {
            config.memory_mib = number(text)?;
            Ok(())
        },
    ),
    setting(
        "web",
        "hook",
        "true",
        "Serve web endpoints straight from the container; false forces the official runtime's data channel.",
        |config, text| {
            config.web_hook = boolean(text)?;
            Ok(())
        },
    ),
    setting(
        "functions",
        "scaledown_window",
        "60",
        "Seconds that a container may be idle, for functions that say nothing.",
        |config, text| {
            config.scaledown_window = Duration::from_secs(u64::from(number(text)?));
            Ok(())
        },
    ),
    setting(
        "worker",
        "embedded",
        "true",
        "Whether `ionian serve` is a worker itself; without, containers run where `ionian worker` does.",
        |config, text| {
            config.embedded_worker = boolean(text)?;
            Ok(())
        },
    ),
    setting(
        "worker",
        "content_cache_gib",
        "20",
        "How much of the users' files a worker process keeps that has them from the server, in GiB.",
        |config, text| {
            config.content_cache_gib = number(text)?.max(1);
            Ok(())
        },
    ),
    setting(
        "trust",
        "ca_bundle",
        "\"auto\"",
        "The CA bundle given to builds and containers: a file, \"auto\" for the host's, or \"none\".",
        |config, text| {
            text.clone_into(&mut config.ca_bundle);
            Ok(())
        },
    ),
    setting(
        "trust",
        "env",
        "[]",
        "Variables for builds and containers, as in [\"HTTPS_PROXY=http://proxy:3128\", \"PIP_INDEX_URL=…\"].",
        |config, text| {
            config.trust_env = Vec::new();
            for pair in list(text) {
                let (name, value) = pair
                    .split_once('=')
                    .ok_or_else(|| format!("'{pair}' is not NAME=value"))?;
                config.trust_env.push((name.to_owned(), value.to_owned()));
            }
            Ok(())
        },
    ),
    setting(
        "debug",
        "journal",
        "\"\"",
        "A file for what the scheduler was told and decided, one line per turn; `ionian replay` runs it again.",
        |config, text| {
            config.journal = (!text.is_empty()).then(|| PathBuf::from(text));
            Ok(())
        },
    ),
];

/// Values of a list are separated by commas in the environment.
fn list(text: &str) -> Vec<String> {
    text.split(',')
        .map(str::trim)
        .filter(|item| !item.is_empty())
        .map(str::to_owned)
        .collect()
}

fn number(text: &str) -> Result<u32, String> {
    text.parse().map_err(|_| format!("'{text}' is not a whole number"))
}

fn boolean(text: &str) -> Result<bool, String> {
    match text {
        "true" | "1" => Ok(true),
        "false" | "0" => Ok(false),
        _ => Err(format!("'{text}' is neither true nor false")),
    }
}

fn parse_public_url(text: &str) -> Result<(String, u16), String> {
    let (scheme, rest) = text.split_once("://").ok_or("it must begin with http:// or https://")?;
    let default_port = match scheme {
        "http" => 80,
        "https" => 443,
        _ => return Err("it must begin with http:// or https://".to_owned()),
    };
    let authority = rest.trim_end_matches('/');
    let port = match authority.rsplit_once(':') {
        Some((_, port)) => port.parse().map_err(|_| format!("'{port}' is not a port"))?,
        None => default_port,
    };
    Ok((scheme.to_owned(), port))
}

/// Only here so that the type of an address list stays in one place.
pub(crate) type Addresses = Vec<SocketAddr>;

#[expect(clippy::print_stdout, reason = "the output of a command")]
pub(crate) fn print_documented() {
    let mut section = "";
    for setting in SETTINGS {
        if setting.section != section {
            section = setting.section;
            println!("\n[{section}]");
        }
        println!("# {} (also {})", setting.meaning, setting.variable());
        println!("# {} = {}", setting.key, setting.default);
    }
}
