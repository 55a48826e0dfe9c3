//! Reads a Python package index: which files a project has, and the files.
//!
//! Speaks the simple API in both of its forms (JSON and HTML), because mirrors and proxies of companies
//! often have only the older one. Verifies every file against the digest that the index states. It
//! resolves no dependencies: that is left to pip, which runs inside images.

use std::fs::File;
use std::io::{Seek, Write};
use std::path::Path;
use std::time::Duration;

use futures_util::StreamExt;
use serde::Deserialize;
use sha2::{Digest, Sha256};
use url::Url;

use super::chain;

/// The page of a project with thousands of files has 2 MB.
const MAX_PAGE_BYTES: usize = 64 << 20;
/// The largest wheels (of CUDA builds) have 3 GB; this client fetches programs only.
const MAX_FILE_BYTES: u64 = 512 << 20;
const READ_TIMEOUT: Duration = Duration::from_mins(1);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Debug, Clone)]
pub struct PackageIndexConfig {
    /// The simple API's root, as pip's `--index-url`.
    pub url: String,
}

impl Default for PackageIndexConfig {
    fn default() -> Self {
        Self {
            url: "https://pypi.org/simple/".to_owned(),
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum PackageIndexError {
    #[error("'{url}' is not the URL of a package index")]
    InvalidUrl { url: String },
    #[error("failed to set up the client of the package index ({why})")]
    Client { why: String },
    #[error("package index {host} cannot be reached ({why})")]
    Unreachable { host: String, why: String },
    #[error("package index {host} answers {status} for {what}")]
    Status { host: String, status: u16, what: String },
    #[error("the page of {project} on package index {host} cannot be read ({why})")]
    Page { host: String, project: String, why: String },
    #[error("{filename} on package index {host} is refused: {why}")]
    File {
        host: String,
        filename: String,
        why: String,
    },
    #[error("failed to keep {filename}")]
    Io { filename: String, source: std::io::Error },
}

/// One file of a project.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IndexFile {
    pub filename: String,
    pub url: Url,
    pub sha256_hex: String,
    pub is_yanked: bool,
}

/// A client of one index; cheap to clone.
#[derive(Debug, Clone)]
pub struct PackageIndex {
    url: Url,
    http: reqwest::Client,
}

#[derive(Deserialize)]
struct JsonPage {
    files: Vec<JsonFile>,
}

#[derive(Deserialize)]
struct JsonFile {
    filename: String,
    url: String,
    #[serde(default)]
    hashes: std::collections::BTreeMap<String, String>,
    /// `false`, `true`, or the reason.
    #[serde(default)]
    yanked: serde_json::Value,
}

impl PackageIndex {
    pub fn new(config: &PackageIndexConfig) -> Result<Self, PackageIndexError> {
        let invalid = || PackageIndexError::InvalidUrl {
            url: redacted(&config.url),
        };
        let mut url = Url::parse(&config.url).map_err(|_| invalid())?;
        if url.host_str().is_none() || !["http", "https"].contains(&url.scheme()) {
            return Err(invalid());
        }
        if !url.path().ends_with('/') {
            let path = format!("{}/", url.path());
            url.set_path(&path);
        }
        // Trusts what the host trusts: the platform's verifier reads its bundle and `SSL_CERT_FILE`.
        let http = reqwest::Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(READ_TIMEOUT)
            .user_agent(concat!("ionian/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|error| PackageIndexError::Client { why: chain(&error) })?;
        Ok(Self { url, http })
    }

    pub fn host(&self) -> &str {
        self.url.host_str().unwrap_or_default()
    }

    /// The files of a project that the index has a sha256 digest of.
    pub async fn files(&self, project: &str) -> Result<Vec<IndexFile>, PackageIndexError> {
        let page_error = |why: String| PackageIndexError::Page {
            host: self.host().to_owned(),
            project: project.to_owned(),
            why,
        };
        let url = self
            .url
            .join(&format!("{project}/"))
            .map_err(|error| page_error(error.to_string()))?;
        let accept = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1";
        let request = self.http.get(url).header(reqwest::header::ACCEPT, accept);
        let response = self.answer(request, project).await?;
        // Links are relative to where redirects led.
        let base = response.url().clone();
        let mut page = Vec::new();
        let mut body = response.bytes_stream();
        while let Some(chunk) = body.next().await {
            page.extend_from_slice(&chunk.map_err(|error| page_error(chain(&error)))?);
            if page.len() > MAX_PAGE_BYTES {
                return Err(page_error("it is too long".to_owned()));
            }
        }
        parse_page(&page, &base).map_err(|error| page_error(error.to_string()))
    }

    /// Downloads a file and verifies it. The result has no name and is at its start.
    pub async fn download(&self, file: &IndexFile, scratch_dir: &Path) -> Result<File, PackageIndexError> {
        let refused = |why: String| PackageIndexError::File {
            host: self.host().to_owned(),
            filename: file.filename.clone(),
            why,
        };
        let io = |source| PackageIndexError::Io {
            filename: file.filename.clone(),
            source,
        };
        let response = self.answer(self.http.get(file.url.clone()), &file.filename).await?;
        let mut kept = tempfile::tempfile_in(scratch_dir).map_err(io)?;
        let mut hash = Sha256::new();
        let mut length = 0;
        let mut body = response.bytes_stream();
        while let Some(chunk) = body.next().await {
            let chunk = chunk.map_err(|error| refused(format!("the download broke off ({})", chain(&error))))?;
            length += chunk.len() as u64;
            if length > MAX_FILE_BYTES {
                return Err(refused(format!("it is larger than {MAX_FILE_BYTES} bytes")));
            }
            hash.update(&chunk);
            kept.write_all(&chunk).map_err(io)?;
        }
        let actual = hex::encode(hash.finalize());
        if actual != file.sha256_hex {
            return Err(refused(format!(
                "its sha256 is {actual}, and the index says {}",
                file.sha256_hex
            )));
        }
        kept.rewind().map_err(io)?;
        Ok(kept)
    }

    async fn answer(
        &self,
        request: reqwest::RequestBuilder,
        what: &str,
    ) -> Result<reqwest::Response, PackageIndexError> {
        let response = request.send().await.map_err(|error| PackageIndexError::Unreachable {
            host: self.host().to_owned(),
            // Without the URL, which may hold the index's password.
            why: chain(&error.without_url()),
        })?;
        let status = response.status();
        if !status.is_success() {
            let (host, what) = (self.host().to_owned(), what.to_owned());
            return Err(PackageIndexError::Status {
                host,
                status: status.as_u16(),
                what,
            });
        }
        Ok(response)
    }
}

fn redacted(url: &str) -> String {
    match url.rsplit_once('@') {
        Some((_, host)) => format!("…@{host}"),
        None => url.to_owned(),
    }
}

/// By content, not by its declared type, which proxies rewrite.
pub(super) fn parse_page(page: &[u8], base: &Url) -> Result<Vec<IndexFile>, serde_json::Error> {
    let first = page.iter().find(|byte| !byte.is_ascii_whitespace());
    if first == Some(&b'{') {
        parse_json(page, base)
    } else {
        Ok(parse_html(&String::from_utf8_lossy(page), base))
    }
}

fn parse_json(page: &[u8], base: &Url) -> Result<Vec<IndexFile>, serde_json::Error> {
    let page: JsonPage = serde_json::from_slice(page)?;
    let files = page.files.into_iter().filter_map(|file| {
        Some(IndexFile {
            url: base.join(&file.url).ok()?,
            sha256_hex: file.hashes.get("sha256")?.to_ascii_lowercase(),
            is_yanked: !matches!(file.yanked, serde_json::Value::Null | serde_json::Value::Bool(false)),
            filename: file.filename,
        })
    });
    Ok(files.collect())
}

/// The anchors of an index page: `<a href="…#sha256=…" data-yanked>name</a>`.
///
/// Index pages are written by a handful of programs and are anchors only, so this reads anchors and
/// nothing else of HTML.
fn parse_html(page: &str, base: &Url) -> Vec<IndexFile> {
    let mut files = Vec::new();
    for piece in page.split("<a ").skip(1) {
        let Some((attributes, rest)) = split_tag(piece) else {
            continue;
        };
        let Some((text, _)) = rest.split_once("</a>") else {
            continue;
        };
        let Some(href) = attribute(attributes, "href") else {
            continue;
        };
        let Ok(mut url) = base.join(&unescape(href)) else {
            continue;
        };
        let Some(digest) = url.fragment().and_then(|fragment| fragment.strip_prefix("sha256=")) else {
            continue;
        };
        let sha256_hex = digest.to_ascii_lowercase();
        url.set_fragment(None);
        files.push(IndexFile {
            filename: unescape(text.trim()),
            url,
            sha256_hex,
            is_yanked: attributes.contains("data-yanked"),
        });
    }
    files
}

/// The attributes of a tag and what follows it; a `>` within quotes does not end the tag.
fn split_tag(text: &str) -> Option<(&str, &str)> {
    let mut quote = None;
    for (at, byte) in text.bytes().enumerate() {
        match (quote, byte) {
            (None, b'>') => return Some((&text[..at], &text[at + 1..])),
            (None, b'"' | b'\'') => quote = Some(byte),
            (Some(open), _) if open == byte => quote = None,
            (None | Some(_), _) => {}
        }
    }
    None
}

fn attribute<'a>(attributes: &'a str, name: &str) -> Option<&'a str> {
    let at = attributes.find(&format!("{name}="))?;
    let value = &attributes[at + name.len() + 1..];
    let quote = value.chars().next().filter(|first| ['"', '\''].contains(first))?;
    value[1..].split(quote).next()
}

fn unescape(text: &str) -> String {
    text.replace("&lt;", "<")
        .replace("&gt;", ">")
        .replace("&quot;", "\"")
        .replace("&amp;", "&")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn base() -> Url {
        Url::parse("https://index.example/simple/uv/").unwrap()
    }

    #[test]
    fn both_forms_of_a_page_say_the_same() {
        let digest = "a".repeat(64);
        let html = format!(
            "<!DOCTYPE html><html><body>\n<a href=\"../../files/uv-1.0-py3-none-any.whl#sha256={digest}\" \
             data-requires-python=\"&gt;=3.8\">uv-1.0-py3-none-any.whl</a><br/>\n\
             <a data-yanked=\"bad > worse\" href='https://files.example/uv-1.1.whl#sha256={digest}'>uv-1.1.whl</a>\n\
             <a href=\"unsigned.whl\">unsigned.whl</a></body></html>"
        );
        let json = format!(
            "{{\"meta\":{{\"api-version\":\"1.0\"}},\"name\":\"uv\",\"files\":[\
             {{\"filename\":\"uv-1.0-py3-none-any.whl\",\"url\":\"../../files/uv-1.0-py3-none-any.whl\",\"hashes\":{{\"sha256\":\"{digest}\"}},\"yanked\":false}},\
             {{\"filename\":\"uv-1.1.whl\",\"url\":\"https://files.example/uv-1.1.whl\",\"hashes\":{{\"sha256\":\"{digest}\"}},\"yanked\":\"bad\"}},\
             {{\"filename\":\"unsigned.whl\",\"url\":\"unsigned.whl\",\"hashes\":{{}}}}]}}"
        );
        let from_html = parse_html(&html, &base());
        assert_eq!(from_html, parse_json(json.as_bytes(), &base()).unwrap());
        assert_eq!(from_html.len(), 2);
        assert_eq!(
            from_html[0].url.as_str(),
            "https://index.example/files/uv-1.0-py3-none-any.whl"
        );
        assert_eq!(
            from_html.iter().map(|file| file.is_yanked).collect::<Vec<_>>(),
            [false, true]
        );
    }

    #[test]
    fn rubbish_is_an_empty_page() {
        for page in [
            "",
            "<a ",
            "<a href=>x</a>",
            "<a href=\"x#sha256=",
            "no anchors",
            "<a href='http://[::#sha256=1'>x</a>",
        ] {
            assert_eq!(parse_html(page, &base()), Vec::new(), "{page}");
        }
    }

    #[test]
    fn an_index_needs_a_web_address() {
        for url in ["", "pypi.org/simple", "file:///srv/index", "https://"] {
            assert!(
                PackageIndex::new(&PackageIndexConfig { url: url.to_owned() }).is_err(),
                "{url}"
            );
        }
        let index = PackageIndex::new(&PackageIndexConfig {
            url: "https://index.example/simple".to_owned(),
        })
        .unwrap();
        assert_eq!(index.url.as_str(), "https://index.example/simple/");
    }
}
