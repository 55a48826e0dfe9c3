//! The XML of S3's `CompleteMultipartUpload`, which the client sends and reads.

use ionian_blobs::{CompletedPart, Md5Digest};
use serde::Deserialize;

#[derive(Deserialize)]
#[serde(rename = "CompleteMultipartUpload")]
struct Request {
    #[serde(rename = "Part", default)]
    parts: Vec<Part>,
}

#[derive(Deserialize)]
struct Part {
    #[serde(rename = "PartNumber")]
    number: u32,
    #[serde(rename = "ETag")]
    etag: String,
}

/// The error is a sentence for the client.
pub(super) fn parse(body: &[u8]) -> Result<Vec<CompletedPart>, String> {
    let text = std::str::from_utf8(body).map_err(|_| "the completion is not text".to_owned())?;
    let request: Request = quick_xml::de::from_str(text)
        .map_err(|error| format!("the completion is not a CompleteMultipartUpload document: {error}"))?;
    request
        .parts
        .into_iter()
        .map(|Part { number, etag }| {
            let md5: Md5Digest = etag
                .trim()
                .trim_matches('"')
                .parse()
                .map_err(|error| format!("the ETag of part {number} is not one that we gave out: {error}"))?;
            Ok(CompletedPart { number, md5 })
        })
        .collect()
}

/// The client looks for the `ETag` anywhere in the text. It is hexadecimal, so nothing needs escaping.
pub(super) fn render(etag: &str) -> String {
    format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n\
         <CompleteMultipartUploadResult><ETag>\"{etag}\"</ETag></CompleteMultipartUploadResult>\n"
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_the_client_sends() {
        let body = "<CompleteMultipartUpload>\n\
            <Part>\n<PartNumber>1</PartNumber>\n<ETag>\"5d41402abc4b2a76b9719d911017c592\"</ETag>\n</Part>\n\
            <Part>\n<PartNumber>2</PartNumber>\n<ETag>&quot;d41d8cd98f00b204e9800998ecf8427e&quot;</ETag>\n</Part>\n\
            </CompleteMultipartUpload>";
        let parts = parse(body.as_bytes()).unwrap();
        let wanted = [(1, &b"hello"[..]), (2, b"")].map(|(number, bytes)| CompletedPart {
            number,
            md5: Md5Digest::of(bytes),
        });
        assert_eq!(parts, wanted);
    }

    #[test]
    fn what_it_does_not_send() {
        let entities = "<!DOCTYPE a [<!ENTITY b \"c\">]><CompleteMultipartUpload><Part><PartNumber>1</PartNumber>\
            <ETag>&b;</ETag></Part></CompleteMultipartUpload>";
        for bad in [
            "",
            "{}",
            "<CompleteMultipartUpload><Part>",
            "<CompleteMultipartUpload><Part><PartNumber>x</PartNumber><ETag>\"\"</ETag></Part></CompleteMultipartUpload>",
            "<CompleteMultipartUpload><Part><PartNumber>1</PartNumber></Part></CompleteMultipartUpload>",
            "<CompleteMultipartUpload><Part><PartNumber>1</PartNumber><ETag>\"nothex\"</ETag></Part></CompleteMultipartUpload>",
            entities,
        ] {
            assert!(parse(bad.as_bytes()).is_err(), "{bad}");
        }
        assert!(parse(&[0xff, 0xfe]).is_err());
        assert_eq!(
            parse(b"<CompleteMultipartUpload></CompleteMultipartUpload>"),
            Ok(vec![])
        );
    }

    proptest! {
        #[test]
        fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&bytes);
        }
    }
}
