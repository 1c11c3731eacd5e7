//! Captures from a SQLite file. (*source* → order → route → encode → sink)

use super::{Page, PageLimits, Source, SourceError};
use crate::position::Position;

/// Reads the outbox of one file for one pipeline.
pub struct SqliteSource {}

impl Source for SqliteSource {
    fn seek(&mut self, _position: Position) {
        unimplemented!()
    }

    async fn capture(&mut self, _: PageLimits, _: &Position) -> Result<Page, SourceError> {
        unimplemented!()
    }

    async fn wake(&mut self) {
        unimplemented!()
    }
}
