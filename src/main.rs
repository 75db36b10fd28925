//! The `anywhen` binary: a thin shell around the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    anywhen::cli::main()
}
