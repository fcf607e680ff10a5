from mar_mini.cli import main

main()
