//! Bytes as hexadecimal text, where they are written down as JSON: the journal of the scheduler.

use bytes::Bytes;
use serde::{Deserialize, Deserializer, Serializer};

pub(crate) fn serialize<S: Serializer>(bytes: &Bytes, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{bytes:x}"))
}

pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Bytes, D::Error> {
    let text = String::deserialize(deserializer)?;
    let digits = text.as_bytes();
    if !digits.iter().all(u8::is_ascii_hexdigit) || digits.len() % 2 != 0 {
        return Err(serde::de::Error::custom(
            "bytes are written as pairs of hexadecimal digits",
        ));
    }
    let digit = |digit: u8| char::from(digit).to_digit(16).unwrap_or_default() as u8;
    Ok(digits
        .chunks_exact(2)
        .map(|pair| digit(pair[0]) << 4 | digit(pair[1]))
        .collect())
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use serde::de::IntoDeserializer;
    use serde::de::value::{Error, StrDeserializer};

    fn read(text: &str) -> Result<Bytes, Error> {
        let deserializer: StrDeserializer<'_, Error> = text.into_deserializer();
        super::deserialize(deserializer)
    }

    #[test]
    fn what_is_written_is_read() {
        let bytes = Bytes::from_static(&[0, 1, 0x7f, 0xff]);
        assert_eq!(format!("{bytes:x}"), "00017fff");
        assert_eq!(read("00017fff"), Ok(bytes));
        assert_eq!(read(""), Ok(Bytes::new()));
        assert!(read("0").is_err());
        assert!(read("0g").is_err());
    }
}
