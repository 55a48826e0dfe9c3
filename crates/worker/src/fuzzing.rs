//! A door for the fuzzers (`fuzz/`) to the splitter of containers' output. Nobody else calls it.

use crate::lines::LineSplitter;
pub use crate::lines::MAX_PIECE_BYTES;

/// The pieces of text that chunks of output come to. `flush` says after which chunks a partial line is taken.
pub fn split<'a>(chunks: impl IntoIterator<Item = (&'a [u8], bool)>) -> Vec<String> {
    let mut splitter = LineSplitter::default();
    let mut pieces = Vec::new();
    for (chunk, flush) in chunks {
        splitter.push(chunk, |piece| pieces.push(piece));
        if flush {
            pieces.extend(splitter.take_partial());
        }
    }
    pieces.extend(splitter.finish());
    pieces
}
