//! Bytes of a pipe into pieces of text: lines, and parts of lines that are long or late.

/// Longer lines come in pieces: one log entry must fit a message and a screen.
pub const MAX_PIECE_BYTES: usize = 64 * 1024;

/// Cuts one stream into lines. Bytes that are not UTF-8 are replaced; a character is never cut in two.
#[derive(Debug, Default)]
pub(crate) struct LineSplitter {
    /// At most [`MAX_PIECE_BYTES`], without a newline.
    pending: Vec<u8>,
}

impl LineSplitter {
    /// Takes bytes and gives every piece that is complete, newline included.
    pub(crate) fn push(&mut self, mut bytes: &[u8], mut piece: impl FnMut(String)) {
        while !bytes.is_empty() {
            let room = &bytes[..bytes.len().min(MAX_PIECE_BYTES - self.pending.len())];
            let taken = room
                .iter()
                .position(|byte| *byte == b'\n')
                .map_or(room.len(), |at| at + 1);
            self.pending.extend_from_slice(&room[..taken]);
            bytes = &bytes[taken..];
            if self.pending.ends_with(b"\n") {
                piece(text(&self.pending));
                self.pending.clear();
            } else if self.pending.len() == MAX_PIECE_BYTES
                && let Some(part) = self.take_partial()
            {
                piece(part);
            }
        }
    }

    /// The unfinished line so far, up to its last whole character.
    pub(crate) fn take_partial(&mut self) -> Option<String> {
        let whole = self.pending.len() - unfinished_character(&self.pending);
        if whole == 0 {
            return None;
        }
        let part = text(&self.pending[..whole]);
        self.pending.drain(..whole);
        Some(part)
    }

    /// What is left at the end of the stream.
    pub(crate) fn finish(&mut self) -> Option<String> {
        let rest = std::mem::take(&mut self.pending);
        (!rest.is_empty()).then(|| text(&rest))
    }

    pub(crate) fn has_partial(&self) -> bool {
        !self.pending.is_empty()
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// How many bytes at the end begin a character whose other bytes have not come yet.
fn unfinished_character(bytes: &[u8]) -> usize {
    for (behind, byte) in bytes.iter().rev().take(3).enumerate() {
        let expected = match byte {
            0xC2..=0xDF => 2,
            0xE0..=0xEF => 3,
            0xF0..=0xF4 => 4,
            0x80..=0xBF => continue,
            _ => return 0,
        };
        return if behind + 1 < expected { behind + 1 } else { 0 };
    }
    0
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn split(chunks: &[&[u8]]) -> Vec<String> {
        let mut splitter = LineSplitter::default();
        let mut pieces = Vec::new();
        for chunk in chunks {
            splitter.push(chunk, |piece| pieces.push(piece));
        }
        pieces.extend(splitter.finish());
        pieces
    }

    #[test]
    fn lines_keep_their_ends_however_they_arrive() {
        assert_eq!(split(&[b"one\ntw", b"o\n\nthree"]), ["one\n", "two\n", "\n", "three"]);
        assert_eq!(split(&[b""]), Vec::<String>::new());
    }

    #[test]
    fn a_long_line_comes_in_pieces_of_whole_characters() {
        let line = "é".repeat(MAX_PIECE_BYTES) + "\n";
        // An odd start, so that the limit falls into the middle of a character.
        let bytes = [b"x", line.as_bytes()].concat();
        let pieces = split(&[&bytes]);
        assert!(
            pieces
                .iter()
                .all(|piece| piece.len() <= MAX_PIECE_BYTES && !piece.contains('\u{FFFD}'))
        );
        assert_eq!(pieces.concat(), format!("x{line}"));
    }

    #[test]
    fn a_partial_line_waits_for_the_rest_of_its_character() {
        let mut splitter = LineSplitter::default();
        splitter.push(&"50 %€".as_bytes()[..6], |_| panic!("no line is complete"));
        assert_eq!(splitter.take_partial().as_deref(), Some("50 %"));
        assert_eq!(splitter.take_partial(), None);
        assert!(splitter.has_partial());
        splitter.push(&"€".as_bytes()[2..], |_| panic!("no line is complete"));
        assert_eq!(splitter.take_partial().as_deref(), Some("€"));
        assert!(!splitter.has_partial());
    }

    #[test]
    fn bytes_that_are_not_text_are_replaced() {
        assert_eq!(split(&[b"a\xFFb\n", b"\xE2\x82"]), ["a\u{FFFD}b\n", "\u{FFFD}"]);
    }

    proptest! {
        #[test]
        fn nothing_is_lost_or_reordered(text in "[a-zé€\n]{0,300}", cuts in prop::collection::vec(0usize..900, 0..8)) {
            let bytes = text.as_bytes();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(bytes.len())).collect();
            cuts.extend([0, bytes.len()]);
            cuts.sort_unstable();
            let chunks: Vec<&[u8]> = cuts.windows(2).map(|pair| &bytes[pair[0]..pair[1]]).collect();
            prop_assert_eq!(split(&chunks).concat(), text);
        }
    }
}
