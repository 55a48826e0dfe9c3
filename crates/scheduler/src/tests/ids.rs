//! Ids that follow from names and numbers.

use std::str::FromStr;

use ionian_domain::{AppId, CallId, ContainerId, DefinitionId, FunctionId, InputId, WorkerId};

pub(super) trait Prefixed: FromStr<Err: std::fmt::Debug> {
    const PREFIX: &'static str;
}

macro_rules! prefixed {
    ($($id:ty),*) => { $(impl Prefixed for $id { const PREFIX: &'static str = <$id>::PREFIX; })* };
}
prefixed!(AppId, FunctionId, DefinitionId, CallId, InputId, ContainerId, WorkerId);

pub(super) fn numbered<T: Prefixed>(number: u64) -> T {
    format!("{}-{number:022}", T::PREFIX)
        .parse()
        .expect("22 digits make an id")
}
