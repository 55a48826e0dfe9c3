//! The `Range` header (RFC 9110, section 14), as far as one range goes.

use std::ops::Range;

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Requested {
    All,
    /// Not empty, and within the blob.
    Span(Range<u64>),
    Unsatisfiable,
}

/// Several ranges and unreadable ones are answered with everything, which the RFC allows.
pub(super) fn parse(header: Option<&str>, length: u64) -> Requested {
    let Some((first, last)) = header
        .and_then(|text| text.strip_prefix("bytes="))
        .and_then(|text| text.split_once('-'))
    else {
        return Requested::All;
    };
    let span = match (position(first), position(last)) {
        (Position::At(first), Position::At(last)) if first <= last => first..last.saturating_add(1).min(length),
        (Position::At(first), Position::Open) => first..length,
        (Position::Open, Position::At(suffix)) => length.saturating_sub(suffix)..length,
        (Position::At(_), Position::At(_))
        | (Position::Open, Position::Open)
        | (Position::Unreadable, _)
        | (_, Position::Unreadable) => return Requested::All,
    };
    if span.is_empty() {
        Requested::Unsatisfiable
    } else {
        Requested::Span(span)
    }
}

enum Position {
    At(u64),
    Open,
    Unreadable,
}

fn position(text: &str) -> Position {
    if text.is_empty() {
        return Position::Open;
    }
    // `parse` alone would take a sign.
    if !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Position::Unreadable;
    }
    text.parse().map_or(Position::Unreadable, Position::At)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn forms() {
        for (header, wanted) in [
            ("bytes=0-0", Requested::Span(0..1)),
            ("bytes=2-4", Requested::Span(2..5)),
            ("bytes=2-", Requested::Span(2..10)),
            ("bytes=-3", Requested::Span(7..10)),
            ("bytes=-30", Requested::Span(0..10)),
            ("bytes=5-99", Requested::Span(5..10)),
            ("bytes=5-18446744073709551615", Requested::Span(5..10)),
            ("bytes=10-", Requested::Unsatisfiable),
            ("bytes=-0", Requested::Unsatisfiable),
            ("bytes=4-2", Requested::All),
            ("bytes=-", Requested::All),
            ("bytes=0-1,3-4", Requested::All),
            ("bytes=+1-2", Requested::All),
            ("lines=0-1", Requested::All),
            ("bytes=99999999999999999999-", Requested::All),
        ] {
            assert_eq!(parse(Some(header), 10), wanted, "{header}");
        }
        assert_eq!(parse(None, 10), Requested::All);
        assert_eq!(parse(Some("bytes=0-"), 0), Requested::Unsatisfiable);
    }

    proptest! {
        #[test]
        fn spans_lie_within_the_blob(header in "bytes=[0-9]{0,20}-[0-9]{0,20}", length in any::<u64>()) {
            if let Requested::Span(span) = parse(Some(&header), length) {
                prop_assert!(span.start < span.end && span.end <= length);
            }
        }
    }
}
