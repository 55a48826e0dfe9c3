//! Which tags a Debian release can stand in for, and in what the result differs.

use super::super::reference::BaseReference;

/// A Debian release and the Python in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Release {
    pub codename: &'static str,
    pub number: &'static str,
    pub python: &'static str,
    /// Parts of Python's standard library that this release keeps in packages of their own.
    pub(super) extra_packages: &'static [&'static str],
    /// What the official image of this Python has beside pip; each is a wheel that Debian ships.
    pub(super) seed_wheels: &'static [&'static str],
}

/// The releases that can be made, newest first: the stable ones that mirrors carry.
pub const RELEASES: &[Release] = &[
    Release {
        codename: "trixie",
        number: "13",
        python: "3.13",
        extra_packages: &[],
        seed_wheels: &["pip"],
    },
    Release {
        codename: "bookworm",
        number: "12",
        python: "3.11",
        extra_packages: &[
            "python3-distutils",
            "python3-lib2to3",
            "python3-setuptools-whl",
            "python3-wheel-whl",
        ],
        seed_wheels: &["pip", "setuptools", "wheel"],
    },
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flavor {
    Python,
    Plain,
}

/// How an image is made, and in what it will differ from the one asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recipe {
    pub release: Release,
    pub flavor: Flavor,
    /// The patch version that was asked for, `3.11.12`.
    pub asked_python: Option<String>,
    pub differences: Vec<String>,
}

/// Says how to make what a reference names, or why that cannot be.
pub fn recipe_for(reference: &BaseReference) -> Result<Recipe, String> {
    if reference.digest().is_some() {
        return Err("an image named by its digest cannot be made anew".to_owned());
    }
    let tag = reference.tag().unwrap_or("latest");
    match reference.docker_official() {
        Some("python") => python_recipe(tag),
        Some("debian") => plain_recipe(tag),
        _ => Err("only python and debian images can be made from a Debian mirror".to_owned()),
    }
}

fn python_recipe(tag: &str) -> Result<Recipe, String> {
    let mut words = tag.split('-').peekable();
    let version = words.next_if(|word| word.starts_with(|first: char| first.is_ascii_digit()));
    let mut asked_release = None;
    let mut slim = false;
    for word in words {
        match word {
            "slim" => slim = true,
            "latest" if version.is_none() => {}
            word if is_codename(word) => asked_release = Some(word),
            word => {
                return Err(format!(
                    "a Debian mirror cannot give the variant '{word}' of python:{tag}"
                ));
            }
        }
    }
    let mut asked_python = None;
    let release = match version {
        // `python:slim`, `python:bookworm`, `python:3`: what the newest is, or the named release has.
        None | Some("3") => match asked_release {
            None => RELEASES[0],
            Some(name) => *release_named(name).ok_or_else(|| format!("Debian {name} is not one of {}", known()))?,
        },
        Some(version) => {
            let parts: Vec<&str> = version.split('.').collect();
            let numeric = |part: &&str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
            if !(2..=3).contains(&parts.len()) || !parts.iter().all(numeric) {
                return Err(format!("'{version}' is not a Python version that Debian releases have"));
            }
            let minor = format!("{}.{}", parts[0], parts[1]);
            if parts.len() == 3 {
                asked_python = Some(version.to_owned());
            }
            *RELEASES
                .iter()
                .find(|release| release.python == minor)
                .ok_or_else(|| format!("no Debian release that is made here has Python {minor} ({})", known()))?
        }
    };
    let mut differences = Vec::new();
    if let Some(asked) = asked_release.filter(|asked| *asked != release.codename) {
        let Release { codename, python, .. } = release;
        differences.push(format!(
            "it is Debian {codename}, not {asked}, because {codename} has Python {python}"
        ));
    }
    if !slim {
        differences.push("it is the slim variant: compilers and headers of the full one are not in it".to_owned());
    }
    Ok(Recipe {
        release,
        flavor: Flavor::Python,
        asked_python,
        differences,
    })
}

fn plain_recipe(tag: &str) -> Result<Recipe, String> {
    let (name, slim) = match tag.strip_suffix("-slim") {
        Some(name) => (name, true),
        None => (tag, false),
    };
    let mut differences = Vec::new();
    let release = match name {
        "latest" | "stable" => Some(&RELEASES[0]),
        "oldstable" => RELEASES.get(1),
        name => release_named(name).or_else(|| {
            let (major, _point) = name.split_once('.')?;
            differences.push(format!("it is the newest point release, whatever {name} was"));
            release_named(major)
        }),
    };
    let release = *release.ok_or_else(|| format!("debian:{tag} is not one of {}", known()))?;
    if !slim {
        differences.push("it is the slim variant: manual pages and translations are not in it".to_owned());
    }
    Ok(Recipe {
        release,
        flavor: Flavor::Plain,
        asked_python: None,
        differences,
    })
}

fn release_named(name: &str) -> Option<&'static Release> {
    RELEASES
        .iter()
        .find(|release| release.codename == name || release.number == name)
}

pub(super) fn is_codename(word: &str) -> bool {
    ["stretch", "buster", "bullseye", "bookworm", "trixie", "forky", "sid"].contains(&word)
}

fn known() -> String {
    let each = RELEASES
        .iter()
        .map(|release| format!("{} has {}", release.codename, release.python));
    each.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipe(reference: &str) -> Result<Recipe, String> {
        recipe_for(&BaseReference::parse(reference).unwrap())
    }

    #[test]
    fn the_minor_version_decides_the_release() {
        for (reference, codename, asked) in [
            ("python:3.11.12-slim-bookworm", "bookworm", Some("3.11.12")),
            ("python:3.11-slim", "bookworm", None),
            ("python:3.13-slim-trixie", "trixie", None),
            ("python:3.13.3-slim-bookworm", "trixie", Some("3.13.3")),
            ("python:3.11-slim-trixie", "bookworm", None),
            ("docker.io/library/python:3.11", "bookworm", None),
            ("python:3-slim-bookworm", "bookworm", None),
            ("python:slim", "trixie", None),
            ("python", "trixie", None),
        ] {
            let recipe = recipe(reference).unwrap();
            assert_eq!(recipe.release.codename, codename, "{reference}");
            assert_eq!(recipe.asked_python.as_deref(), asked, "{reference}");
        }
    }

    #[test]
    fn another_release_than_asked_is_said() {
        assert_eq!(
            recipe("python:3.11-slim-bookworm").unwrap().differences,
            Vec::<String>::new()
        );
        let differences = recipe("python:3.11-slim-trixie").unwrap().differences;
        assert_eq!(
            differences,
            ["it is Debian bookworm, not trixie, because bookworm has Python 3.11"]
        );
        assert_eq!(recipe("python:3.11").unwrap().differences.len(), 1);
    }

    #[test]
    fn what_debian_does_not_have_is_said_plainly() {
        for version in ["3.9", "3.10", "3.12", "3.12.4", "3.14", "2.7"] {
            let why = recipe(&format!("python:{version}-slim-bookworm")).unwrap_err();
            assert!(
                why.contains("bookworm has 3.11") && why.contains("trixie has 3.13"),
                "{why}"
            );
        }
        for tag in [
            "3.11-alpine",
            "3.11-slim-windows",
            "3.x",
            "3.11.1.1",
            "3.13.0rc1-slim",
            "slim-bullseye",
        ] {
            assert!(recipe(&format!("python:{tag}")).is_err(), "{tag}");
        }
        assert!(recipe("ubuntu:22.04").is_err());
        assert!(recipe("ghcr.io/library/python:3.11-slim").is_err());
        assert!(recipe(&format!("python@sha256:{}", "0".repeat(64))).is_err());
    }

    #[test]
    fn debian_itself_goes_by_name_and_number() {
        for (tag, codename) in [
            ("bookworm-slim", "bookworm"),
            ("12", "bookworm"),
            ("12.5-slim", "bookworm"),
            ("13-slim", "trixie"),
            ("latest", "trixie"),
            ("stable-slim", "trixie"),
        ] {
            let recipe = recipe(&format!("debian:{tag}")).unwrap();
            assert_eq!(
                (recipe.release.codename, recipe.flavor),
                (codename, Flavor::Plain),
                "{tag}"
            );
        }
        assert!(recipe("debian:sid").is_err());
    }
}
