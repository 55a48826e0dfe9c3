//! Patterns with `*`, `?` and `[a-z]`, as Dockerfiles use them in `COPY` sources and in `${name%pattern}`.

/// Whether the whole text matches. `*` and `?` stop at no character: callers match one path component.
pub(crate) fn matches(pattern: &str, text: &str) -> bool {
    let pattern: Vec<char> = pattern.chars().collect();
    let text: Vec<char> = text.chars().collect();
    matches_chars(&pattern, &text)
}

/// Whether a path component holds anything but literal characters.
pub(crate) fn is_pattern(component: &str) -> bool {
    component.contains(['*', '?', '[', '\\'])
}

/// Removes the shortest or longest match from the start or the end.
pub(crate) fn trim(value: &str, pattern: &str, from_start: bool, longest: bool) -> String {
    let mut cuts: Vec<usize> = value.char_indices().map(|(at, _)| at).chain([value.len()]).collect();
    // The shortest match first: of a prefix that is the smallest cut, of a suffix the greatest.
    if from_start == longest {
        cuts.reverse();
    }
    for cut in cuts {
        let (head, tail) = value.split_at(cut);
        let (matched, rest) = if from_start { (head, tail) } else { (tail, head) };
        if matches(pattern, matched) {
            return rest.to_owned();
        }
    }
    value.to_owned()
}

/// Replaces the first or every (longest, leftmost) match.
pub(crate) fn replace(value: &str, pattern: &str, replacement: &str, all: bool) -> String {
    let pattern: Vec<char> = pattern.chars().collect();
    let text: Vec<char> = value.chars().collect();
    let (mut out, mut at, mut done) = (String::new(), 0, pattern.is_empty());
    while at < text.len() {
        let found = (!done).then(|| {
            (at + 1..=text.len())
                .rev()
                .find(|end| matches_chars(&pattern, &text[at..*end]))
        });
        if let Some(Some(end)) = found {
            out.push_str(replacement);
            at = end;
            done = !all;
        } else {
            out.push(text[at]);
            at += 1;
        }
    }
    out
}

/// Backtracks to the last star only, so the time is at most the product of the two lengths.
fn matches_chars(pattern: &[char], text: &[char]) -> bool {
    let (mut p, mut t) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    loop {
        if p < pattern.len() && pattern[p] == '*' {
            star = Some((p + 1, t));
            p += 1;
            continue;
        }
        if p == pattern.len() && t == text.len() {
            return true;
        }
        if t < text.len()
            && p < pattern.len()
            && let Some(next) = match_one(pattern, p, text[t])
        {
            p = next;
            t += 1;
            continue;
        }
        match star {
            Some((after, from)) if from < text.len() => {
                star = Some((after, from + 1));
                p = after;
                t = from + 1;
            }
            Some(_) | None => return false,
        }
    }
}

/// Matches one character, and says where the pattern goes on.
fn match_one(pattern: &[char], at: usize, c: char) -> Option<usize> {
    match pattern[at] {
        '?' => Some(at + 1),
        '\\' if at + 1 < pattern.len() => (pattern[at + 1] == c).then_some(at + 2),
        '[' => {
            let mut i = at + 1;
            let negated = matches!(pattern.get(i), Some('^' | '!'));
            if negated {
                i += 1;
            }
            let (first, mut found) = (i, false);
            loop {
                let low = *pattern.get(i)?;
                if low == ']' && i > first {
                    return (found != negated).then_some(i + 1);
                }
                if pattern.get(i + 1) == Some(&'-') && pattern.get(i + 2).is_some_and(|high| *high != ']') {
                    found |= (low..=pattern[i + 2]).contains(&c);
                    i += 3;
                } else {
                    found |= low == c;
                    i += 1;
                }
            }
        }
        literal => (literal == c).then_some(at + 1),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn patterns_match_as_documented() {
        for (pattern, text, wanted) in [
            ("*.txt", "a.txt", true),
            ("*.txt", "a.txt.gz", false),
            ("req*", "requirements", true),
            ("a?c", "abc", true),
            ("a?c", "ac", false),
            ("[a-c]x", "bx", true),
            ("[^a-c]x", "bx", false),
            ("[]]", "]", true),
            (r"\*", "*", true),
            (r"\*", "a", false),
            ("[", "[", false),
            ("*a*b*", "xxaxxbxx", true),
            ("", "", true),
            ("*", "", true),
        ] {
            assert_eq!(matches(pattern, text), wanted, "{pattern} {text}");
        }
    }

    #[test]
    fn many_stars_take_no_exponential_time() {
        assert!(!matches(&"*a".repeat(200), &"a".repeat(150)));
    }

    proptest! {
        #[test]
        fn a_text_without_specials_matches_itself_only(a in "[a-z.]{0,12}", b in "[a-z.]{0,12}") {
            prop_assert!(matches(&a, &a));
            prop_assert_eq!(matches(&a, &b), a == b);
        }

        #[test]
        fn trimming_gives_a_part(value in "[a-c.]{0,12}", pattern in "[a-c.*?]{0,6}", start: bool, longest: bool) {
            let trimmed = trim(&value, &pattern, start, longest);
            let is_part = if start { value.ends_with(&trimmed) } else { value.starts_with(&trimmed) };
            prop_assert!(is_part);
        }
    }
}
