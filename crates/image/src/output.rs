//! The output of a step on its way to the build log: secrets are masked, and the end is remembered.

use bytes::Bytes;

use crate::step::{BuildLogChunk, LogStream};

/// What stands in the log instead of a secret.
const MASK: &[u8] = b"***";

/// Shorter values are not masked: they would be found all over harmless output, and guessed anyway.
const MIN_SECRET_BYTES: usize = 6;

/// How much of the end is kept for the message of a failed step.
const TAIL_BYTES: usize = 4096;
const TAIL_LINES: usize = 20;

/// Masks secrets, also where one is split over chunks.
///
/// What could be the start of a secret is held back until the next chunk decides. Both streams have
/// a filter of their own, since their chunks interleave.
pub(crate) struct Masker {
    secrets: Vec<Vec<u8>>,
    held: Vec<u8>,
}

impl Masker {
    pub(crate) fn new<'a>(secrets: impl IntoIterator<Item = &'a str>) -> Self {
        let mut found: Vec<Vec<u8>> = Vec::new();
        for secret in secrets {
            // A secret of several lines (a key) is printed line by line.
            for part in secret.lines().chain([secret]) {
                let part = part.trim().as_bytes();
                if part.len() >= MIN_SECRET_BYTES && !found.iter().any(|other| other == part) {
                    found.push(part.to_vec());
                }
            }
        }
        // The longest first, so that no part of one is left when another begins alike.
        found.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
        Self {
            secrets: found,
            held: Vec::new(),
        }
    }

    pub(crate) fn push(&mut self, chunk: &[u8]) -> Bytes {
        if self.secrets.is_empty() {
            return Bytes::copy_from_slice(chunk);
        }
        self.held.extend_from_slice(chunk);
        let (mut out, mut at) = (Vec::with_capacity(self.held.len()), 0);
        while at < self.held.len() {
            let rest = &self.held[at..];
            // A longer secret may still be on its way where a shorter one has arrived.
            if self
                .secrets
                .iter()
                .any(|secret| secret.len() > rest.len() && secret.starts_with(rest))
            {
                break;
            }
            if let Some(secret) = self.secrets.iter().find(|secret| rest.starts_with(secret)) {
                out.extend_from_slice(MASK);
                at += secret.len();
            } else {
                out.push(rest[0]);
                at += 1;
            }
        }
        self.held.drain(..at);
        Bytes::from(out)
    }

    /// What is still held back when the output ends.
    pub(crate) fn finish(&mut self) -> Bytes {
        let rest = std::mem::take(&mut self.held);
        match self.secrets.iter().find(|secret| rest.starts_with(secret)) {
            None => Bytes::from(rest),
            Some(secret) => [MASK, &rest[secret.len()..]].concat().into(),
        }
    }
}

/// The last lines of a step's output.
#[derive(Default)]
pub(crate) struct Tail {
    bytes: Vec<u8>,
}

impl Tail {
    pub(crate) fn push(&mut self, chunk: &[u8]) {
        self.bytes.extend_from_slice(chunk);
        if self.bytes.len() > 2 * TAIL_BYTES {
            self.bytes.drain(..self.bytes.len() - TAIL_BYTES);
        }
    }

    pub(crate) fn text(&self) -> String {
        let start = self.bytes.len().saturating_sub(TAIL_BYTES);
        let text = String::from_utf8_lossy(&self.bytes[start..]);
        let lines: Vec<&str> = text.trim_end().lines().collect();
        // Progress bars rewrite their line: only the last state counts.
        let lines = lines
            .iter()
            .map(|line| line.rsplit('\r').find(|part| !part.is_empty()).unwrap_or("").trim_end());
        let lines: Vec<&str> = lines.collect();
        lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
    }
}

/// Both streams of a step, masked and remembered.
pub(crate) struct StepOutput {
    stdout: Masker,
    stderr: Masker,
    pub(crate) tail: Tail,
}

impl StepOutput {
    pub(crate) fn new(secrets: &[(String, String)]) -> Self {
        let masker = || Masker::new(secrets.iter().map(|(_, value)| value.as_str()));
        Self {
            stdout: masker(),
            stderr: masker(),
            tail: Tail::default(),
        }
    }

    pub(crate) fn push(&mut self, chunk: &BuildLogChunk) -> Bytes {
        let masker = if chunk.stream == LogStream::Stderr {
            &mut self.stderr
        } else {
            &mut self.stdout
        };
        let bytes = masker.push(&chunk.bytes);
        self.tail.push(&bytes);
        bytes
    }

    pub(crate) fn finish(&mut self) -> [(LogStream, Bytes); 2] {
        let rest = [
            (LogStream::Stdout, self.stdout.finish()),
            (LogStream::Stderr, self.stderr.finish()),
        ];
        for (_, bytes) in &rest {
            self.tail.push(bytes);
        }
        rest
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn masked(secrets: &[&str], chunks: &[&[u8]]) -> String {
        let mut masker = Masker::new(secrets.iter().copied());
        let mut out = Vec::new();
        for chunk in chunks {
            out.extend_from_slice(&masker.push(chunk));
        }
        out.extend_from_slice(&masker.finish());
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn secrets_are_masked_also_when_split() {
        assert_eq!(
            masked(&["hunter22"], &[b"a hunt", b"er22 b hunter2"]),
            "a *** b hunter2"
        );
        assert_eq!(masked(&["abcdef", "abcdefgh"], &[b"abcdef", b"gh abcdef"]), "*** ***");
        assert_eq!(masked(&["line one\nline two"], &[b"line one\nline two\n"]), "***\n");
        assert_eq!(masked(&["short"], &[b"short"]), "short");
    }

    #[test]
    fn the_tail_is_the_end_of_the_output() {
        let mut tail = Tail::default();
        for line in 0..10_000 {
            tail.push(format!("line {line}\n").as_bytes());
        }
        let text = tail.text();
        assert!(text.ends_with("line 9999"));
        assert_eq!(text.lines().count(), TAIL_LINES);
        let mut tail = Tail::default();
        tail.push(b"10%\r20%\r\nend\r\n");
        assert_eq!(tail.text(), "20%\nend");
    }

    proptest! {
        #[test]
        fn however_it_is_split_the_output_is_the_same(
            text in "(secret1|secret12|s|e|x|\n){0,20}",
            cuts in proptest::collection::vec(0_usize..100, 0..6),
        ) {
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(text.len())).collect();
            cuts.sort_unstable();
            let mut chunks = Vec::new();
            let mut from = 0;
            for cut in cuts.into_iter().chain([text.len()]) {
                chunks.push(&text.as_bytes()[from..cut]);
                from = cut;
            }
            let whole = masked(&["secret1", "secret12"], &[text.as_bytes()]);
            prop_assert_eq!(&masked(&["secret1", "secret12"], &chunks), &whole);
            prop_assert!(!whole.contains("secret1"));
        }

        #[test]
        fn without_secrets_nothing_changes(text in "[a-z]{0,40}") {
            prop_assert_eq!(masked(&["long-secret"], &[text.as_bytes()]), text);
        }
    }
}
