//! The books in a SQLite file.

use super::{Acquired, Fenced, Ledger, LedgerError, Parked};
use crate::position::Position;

/// The books of one pipeline in one file.
pub struct SqliteLedger {}

impl Ledger for SqliteLedger {
    async fn acquire(&mut self) -> Result<Acquired, LedgerError> {
        unimplemented!()
    }

    async fn renew(&mut self) -> Result<Fenced, LedgerError> {
        unimplemented!()
    }

    async fn acknowledge(&mut self, _: &Position) -> Result<Fenced, LedgerError> {
        unimplemented!()
    }

    async fn park(&mut self, _: &[Parked]) -> Result<Fenced, LedgerError> {
        unimplemented!()
    }

    async fn release(&mut self) -> Result<(), LedgerError> {
        unimplemented!()
    }
}
