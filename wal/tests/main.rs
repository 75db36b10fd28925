//! The log as real servers write it, as a test encoder writes it, and as nobody should.
#![expect(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    clippy::disallowed_types,
    clippy::panic,
    clippy::print_stderr,
    reason = "helpers of tests are not covered by the settings for tests; these read files, and \
              the fuzz targets look at the clock"
)]

mod fuzz;
mod golden;
mod properties;
mod summaries;
mod synthetic;
mod waldump;
mod walking;
